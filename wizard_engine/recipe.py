"""What recipes share around their loop: stages opened from a configuration, work of the main rank, models by name."""

import dataclasses
import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .config import cli
from .data.chat import Sample
from .data.tokenizer import Tokenizer, load_tokenizer
from .model import (
    PRESETS,
    ModelConfig,
    ModelDirectory,
    ScoringModel,
    Transformer,
    load_model,
    save_divided,
    save_model,
    scoring_head,
)
from .parallel import Mesh, Sharding, check_same, from_main, parallelize, sharded
from .rollout.rewards import InstructionReward, ProcessReward
from .runtime import Runtime, stop, watch
from .stage import Stage
from .training import Interrupted, Training

T = TypeVar("T")

# Options that change how a stage runs but not what it makes.
INCIDENTAL = (
    "out", "quiet", "overwrite", "device", "save_every", "keep_last", "audit", "batch_size", "mesh", "recompute",
    "accumulate", "offload_activations", "offload_optimizer", "cache_tokens", "sampler_tp",
)  # fmt: skip


def on_main(runtime: Runtime, work: Callable[[], T]) -> T:
    """The result of `work`, done by rank 0 alone and sent to every rank; its ValueError is raised on every rank."""
    return from_main(runtime, work)


def identity(cfg: Any) -> tuple[dict[str, Any], dict[str, Path]]:
    """What a configuration makes: the options that count, and the files and directories that it reads."""
    options: dict[str, Any] = {}
    inputs: dict[str, Path] = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in INCIDENTAL:
            continue
        if dataclasses.is_dataclass(value):
            inner, more = identity(value)
            options[field.name] = inner
            inputs |= {f"{field.name}.{key}": path for key, path in more.items()}
            continue
        files = _files(value)
        for index, path in enumerate(files):
            inputs[field.name if len(files) == 1 else f"{field.name}.{index}"] = path
        rest = _without_files(value)
        if rest not in (None, [], {}) or not files:
            options[field.name] = rest
    return options, inputs


def _without_files(value: Any) -> Any:
    """An option's value without the paths in it."""
    if isinstance(value, tuple | list):
        return [item for item in value if not _files(item)]
    if isinstance(value, Mapping):
        return {key: item for key, item in value.items() if not _files(item)}
    return None if _files(value) else value


def _files(value: Any) -> list[Path]:
    """Paths in an option's value: paths, lists of them, and text that names an existing directory."""
    if isinstance(value, Path):
        return [value]
    if isinstance(value, str) and "/" in value and Path(value).is_dir():
        return [Path(value)]
    if isinstance(value, Mapping):
        return [path for item in value.values() for path in _files(item)]
    if isinstance(value, tuple | list):
        return [path for item in value for path in _files(item)]
    return []


def open_stage(cfg: Any, name: str, runtime: Runtime) -> Stage:
    """The stage that a recipe's configuration describes, claimed unless it is done (`stage.done`)."""
    options, inputs = identity(cfg)
    check_same(runtime, f"{name}: configuration", options | {key: str(path) for key, path in inputs.items()})
    stage = Stage(cfg.out, name, options, inputs, overwrite=cfg.overwrite)

    def claim() -> bool:
        if stage.is_current():
            return True
        stage.start()
        return False

    stage.done = on_main(runtime, claim)
    return stage


def finish_stage(stage: Stage, runtime: Runtime, result: dict, outputs: list[Path]) -> dict:
    """Record the stage as done (rank 0) and give its result back on every rank."""
    on_main(runtime, lambda: stage.finish(result, outputs))
    return result


def language_model(
    model: str, tokenizer: Path | None, *, seed: int, device: Any, mesh: Mesh | None = None,
    sharding: Sharding | None = None, frozen: bool = False,
) -> tuple[Transformer, Tokenizer]:  # fmt: skip
    """A language model from a directory, or a preset's with random weights and the given tokenizer.

    Args:
        mesh: divide it over these ranks, each of which reads its own part alone; None: a whole, plain model.
        frozen: it is not going to be trained.
    Raises:
        ValueError: neither a directory nor a preset, a preset without a tokenizer, a reward model's directory, or
            ranks for the experts of a model without them.
    """
    if model in PRESETS and not Path(model).is_dir():
        if tokenizer is None:
            raise ValueError(f"model: preset {model} has random weights; say which --tokenizer it shall have")
        loaded = load_tokenizer(tokenizer)
        config = dataclasses.replace(PRESETS[model], vocab_size=loaded.vocab_size)
        _check_experts(config, mesh)
        if mesh is None:
            return Transformer(config, seed=seed).to(device), loaded
        with torch.device("meta"):
            empty = Transformer(config)
        values = empty.random_parameters(seed)
        return divided(empty, mesh, sharding, values, frozen=frozen), loaded
    if not Path(model).is_dir():
        raise ValueError(f"model: expected a model directory or one of {sorted(PRESETS)}, got {model}")
    if mesh is None:
        found, own = load_model(model, device=device)
    else:
        found, own = divided_directory(Path(model), mesh, sharding, frozen=frozen), load_tokenizer(Path(model))
    _check_experts(found.config, mesh)
    if isinstance(found, ScoringModel):
        raise ValueError(f"{model}: expected a language model, got a reward model with {found.outputs} outputs")
    return found, own if tokenizer is None else load_tokenizer(tokenizer)


def _check_experts(config: ModelConfig, mesh: Mesh | None) -> None:
    """Beside a mixture, dense reward models may stand on a mesh with ep; alone, ep is a mistake."""
    if mesh is not None and mesh.ep.size > 1 and not config.experts:
        raise ValueError(f"mesh.ep: expected 1 for a model without experts, got {mesh.ep.size}")


def divided(
    empty: nn.Module, mesh: Mesh, sharding: Sharding | None, values: Any = (), *, frozen: bool = False
) -> Any:  # fmt: skip
    """A model on the meta device divided over a mesh and filled with (name, tensor) pairs."""
    if frozen:
        empty.requires_grad_(False)
    model = parallelize(empty, mesh, sharding)
    for name, value in values:
        sharded(model).put(name, value)
    sharded(model).publish()
    return model


def fill(model: nn.Module, directory: ModelDirectory, *, body_only: bool = False) -> None:
    """Read a divided model's parameters out of a directory, each rank its own elements.

    Args:
        body_only: of a scoring model, the body alone; the directory may be a language model's or a scoring model's.
    """
    engine = sharded(model)
    theirs = "" if directory.outputs is None else "body."
    ours = "body." if isinstance(model, ScoringModel) else ""
    for name, start, values in engine.weight_parts():
        if not name.startswith("score."):
            directory.read(theirs + name.removeprefix(ours), start, values, cut=engine.cuts[name])
        elif not body_only:
            directory.read(name, start, values)
    engine.publish()


def divided_directory(path: Path, mesh: Mesh, sharding: Sharding | None, *, frozen: bool = False) -> Any:
    """The model of a directory divided over a mesh."""
    with ModelDirectory(path) as directory:
        model = divided(directory.empty_model(), mesh, sharding, frozen=frozen)
        fill(model, directory)
    return model


def scoring_start(
    source: str, tokenizer: Path | None, outputs: int, *, surprise: bool = False, seed: int, mesh: Mesh,
    sharding: Sharding | None,
) -> tuple[ScoringModel, Tokenizer]:  # fmt: skip
    """A scoring model whose body starts as a language model's (or as a scoring model's body); its head is fresh.

    Args:
        source: a directory, or a preset's name with a tokenizer, as for `language_model`.
    """
    is_preset = source in PRESETS and not Path(source).is_dir()
    if is_preset or not Path(source).is_dir():
        plain, loaded = language_model(source, tokenizer, seed=seed, device="cpu")
        return scoring_of(plain.config, outputs, surprise, mesh, sharding, plain.named_parameters()), loaded
    with ModelDirectory(Path(source)) as directory:
        model = scoring_of(directory.config, outputs, surprise, mesh, sharding)
        fill(model, directory, body_only=True)
    return model, load_tokenizer(tokenizer or Path(source))


def scoring_of(
    config: ModelConfig, outputs: int, surprise: bool, mesh: Mesh, sharding: Sharding | None, body: Any = ()
) -> ScoringModel:
    """A divided scoring model with a fresh head."""
    with torch.device("meta"):
        model = ScoringModel(config, outputs, surprise=surprise)
    model.score = scoring_head(config.width, outputs, surprise=surprise)
    return divided(model, mesh, sharding, ((f"body.{name}", value.detach()) for name, value in body))


def weights_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of weights that only generate; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def write_model(
    runtime: Runtime, model: Any, tokenizer: Tokenizer, path: Path, *, extra: dict | None = None
) -> None:  # fmt: skip
    """Write a model's directory; every rank makes the call."""
    engine = sharded(model)
    if engine is not None and engine.is_divided:
        save_divided(model, path, runtime, tokenizer=tokenizer, extra=extra)
    else:
        on_main(runtime, lambda: save_model(model, tokenizer, path, extra=extra) and None)


def check_rows(runtime: Runtime, name: str, samples: Iterable[Sample]) -> None:
    """ValueError on every rank unless all of them have read the same tokens and loss weights."""
    if runtime.world_size == 1:
        return
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.tokens.tobytes())
        digest.update(sample.weights.tobytes())
    check_same(runtime, f"{name}: tokens of the rows", digest.hexdigest()[:16])


def sample_limit(max_length: int | None, config: ModelConfig, training: Training) -> int:
    """Longest sample, tokens: what was asked for, or the context, and never more than a packed row takes.

    Raises:
        ValueError: more was asked for than the model's context.
    """
    if max_length is not None and not 2 <= max_length <= config.max_positions:
        raise ValueError(f"max_length: expected 2 to {config.max_positions} (the model's context), got {max_length}")
    return min(max_length or config.max_positions, training.pack_tokens + 1)


def scoring_model(
    path: Path, outputs: int, mesh: Mesh, sharding: Sharding | None
) -> tuple[ScoringModel, Tokenizer, dict]:  # fmt: skip
    """A reward model's directory: model (frozen, divided), tokenizer, fields of config.json.

    Raises:
        ValueError: a language model, or a reward model of the other kind.
    """
    with ModelDirectory(path) as directory:
        found = directory.outputs or 0
        if found != outputs:
            kinds = {0: "a language model", 1: "an instruction reward model", 3: "a process reward model"}
            raise ValueError(f"{path}: expected {kinds[outputs]}, got {kinds.get(found, f'{found} outputs')}")
        model = divided(directory.empty_model(), mesh, sharding, frozen=True)
        fill(model, directory)
        return model, load_tokenizer(path), directory.fields


def instruction_reward(path: Path, mesh: Mesh, sharding: Sharding | None) -> InstructionReward:
    """The instruction factor of a directory that recipes/reward.py wrote."""
    model, tokenizer, fields = scoring_model(path, 1, mesh, sharding)
    return InstructionReward(model, tokenizer, mean=fields["wizard_mean"], std=fields["wizard_std"])


def process_reward(path: Path, mesh: Mesh, sharding: Sharding | None, neutral: float) -> ProcessReward:
    """The process factor of a directory that recipes/reward.py wrote."""
    model, tokenizer, _ = scoring_model(path, 3, mesh, sharding)
    return ProcessReward(model, tokenizer, neutral=neutral)


def launch(main: Callable[[Any], Any], config: type, presets: Mapping[str, Any] | None = None) -> None:
    """Run a recipe from the command line: options, then `main`, errors that a user can cause in one line.

    A rank that fails tells the others, which end with its error instead of their own collective's.
    """
    cfg = cli(config, presets)
    name = Path(sys.argv[0]).name
    try:
        main(cfg)
    except (ValueError, OSError) as error:
        _fail(name, error, f"{error}")
        raise SystemExit(1) from error
    except Interrupted as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        raise SystemExit(130) from stopped
    except Exception as error:
        if watch() is None:
            raise
        lost = isinstance(error, RuntimeError) and _is_of_collective(error)
        if not lost:
            traceback.print_exc()
        _fail(name, error, watch().explain() if lost else f"{type(error).__name__}: {error}", tell=not lost)
        raise SystemExit(1) from error
    finally:
        stop()


def _fail(name: str, error: Exception, text: str, *, tell: bool = True) -> None:
    """Print an error, tell the other ranks of it, and end at once where their collectives might keep this one."""
    found = watch()
    where = "" if found is None or text.startswith("[rank") else f"[rank {found.rank}/{found.world_size}] "
    print(f"{name}: error: {where}{text}", file=sys.stderr, flush=True)
    if found is not None:
        if tell:
            found.fail(text)
        sys.stdout.flush()
        os._exit(1)


def _is_of_collective(error: RuntimeError) -> bool:
    """Whether an error is one of a collective whose other side is gone or late, rather than of this rank."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection", "timed out", "peer", "socket")
    )
