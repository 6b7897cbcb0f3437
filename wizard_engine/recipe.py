"""What recipes share around their loop: stages opened from a configuration, work of the main rank, models by name."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from .config import cli
from .data.tokenizer import Tokenizer, load_tokenizer
from .model import PRESETS, ModelConfig, ScoringModel, Transformer, load_model
from .model.hugging_face import read_config
from .rollout.rewards import InstructionReward, ProcessReward
from .runtime import Runtime, stop
from .stage import Stage
from .training import Interrupted, Training

T = TypeVar("T")

# Options that change how a stage runs but not what it makes.
INCIDENTAL = ("out", "quiet", "overwrite", "device", "save_every", "keep_last", "audit", "batch_size")


def on_main(runtime: Runtime, work: Callable[[], T]) -> T:
    """The result of `work`, done by rank 0 alone and sent to every rank; its ValueError is raised on every rank."""
    if runtime.world_size == 1:
        return work()
    outcome: list[Any] = [None, None]
    if runtime.is_main:
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = f"{error}"
    dist.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise ValueError(f"[rank {runtime.rank}/{runtime.world_size}] {outcome[1]}")
    return outcome[0]


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


def language_model(model: str, tokenizer: Path | None, *, seed: int, device: Any) -> tuple[Transformer, Tokenizer]:
    """A language model from a directory, or a preset's with random weights and the given tokenizer.

    Raises:
        ValueError: neither a directory nor a preset, a preset without a tokenizer, or a reward model's directory.
    """
    if model in PRESETS and not Path(model).is_dir():
        if tokenizer is None:
            raise ValueError(f"model: preset {model} has random weights; say which --tokenizer it shall have")
        loaded = load_tokenizer(tokenizer)
        config = dataclasses.replace(PRESETS[model], vocab_size=loaded.vocab_size)
        return Transformer(config, seed=seed).to(device), loaded
    if not Path(model).is_dir():
        raise ValueError(f"model: expected a model directory or one of {sorted(PRESETS)}, got {model}")
    found, own = load_model(model, device=device)
    if isinstance(found, ScoringModel):
        raise ValueError(f"{model}: expected a language model, got a reward model with {found.outputs} outputs")
    return found, own if tokenizer is None else load_tokenizer(tokenizer)


def sample_limit(max_length: int | None, config: ModelConfig, training: Training) -> int:
    """Longest sample, tokens: what was asked for, or the context, and never more than a packed row takes.

    Raises:
        ValueError: more was asked for than the model's context.
    """
    if max_length is not None and not 2 <= max_length <= config.max_positions:
        raise ValueError(f"max_length: expected 2 to {config.max_positions} (the model's context), got {max_length}")
    return min(max_length or config.max_positions, training.pack_tokens + 1)


def scoring_model(path: Path, outputs: int, device: Any) -> tuple[ScoringModel, Tokenizer, dict]:
    """A reward model's directory: model, tokenizer, fields of config.json.

    Raises:
        ValueError: a language model, or a reward model of the other kind.
    """
    model, tokenizer = load_model(path, device=device)
    found = model.outputs if isinstance(model, ScoringModel) else 0
    if found != outputs:
        kinds = {0: "a language model", 1: "an instruction reward model", 3: "a process reward model"}
        raise ValueError(f"{path}: expected {kinds[outputs]}, got {kinds.get(found, f'{found} outputs')}")
    return model, tokenizer, read_config(Path(path))[1]


def instruction_reward(path: Path, runtime: Runtime) -> InstructionReward:
    """The instruction factor of a directory that recipes/reward.py wrote."""
    model, tokenizer, fields = scoring_model(path, 1, runtime.device)
    return InstructionReward(model, tokenizer, mean=fields["wizard_mean"], std=fields["wizard_std"])


def process_reward(path: Path, runtime: Runtime, neutral: float) -> ProcessReward:
    """The process factor of a directory that recipes/reward.py wrote."""
    model, tokenizer, _ = scoring_model(path, 3, runtime.device)
    return ProcessReward(model, tokenizer, neutral=neutral)


def launch(main: Callable[[Any], Any], config: type, presets: Mapping[str, Any] | None = None) -> None:
    """Run a recipe from the command line: options, then `main`, errors that a user can cause in one line."""
    cfg = cli(config, presets)
    try:
        main(cfg)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except Interrupted as stopped:
        print(f"{Path(sys.argv[0]).name}: {stopped}", file=sys.stderr)
        raise SystemExit(130) from stopped
    finally:
        stop()
