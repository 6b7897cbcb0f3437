"""Models of recipes: by directory or preset, whole or divided over a mesh, filled and written."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wizard_engine.data.tokenizer import Tokenizer, load_tokenizer
from wizard_engine.parallel import Mesh, Sharding, parallelize, sharded
from wizard_engine.runtime.metrics import byte_bar
from wizard_engine.runtime.object_collectives import from_main
from wizard_engine.runtime.process import Runtime

from .config import PRESETS, ModelConfig
from .heads import ScoringModel, scoring_head
from .hugging_face import ModelDirectory, load_model, save_model, save_sharded
from .transformer import Transformer
from .vocabulary import check_vocabulary


def language_model(
    model: str,
    tokenizer: Path | None,
    *,
    seed: int,
    device: Any,
    mesh: Mesh | None = None,
    sharding: Sharding | None = None,
    frozen: bool = False,
) -> tuple[Transformer, Tokenizer]:
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
        return shard_model(empty, mesh, sharding, values, frozen=frozen), loaded
    if not Path(model).is_dir():
        raise ValueError(f"model: expected a model directory or one of {sorted(PRESETS)}, got {model}")
    if mesh is None:
        loaded_model, saved_tokenizer = load_model(model, device=device)
    else:
        loaded_model = load_sharded(Path(model), mesh, sharding, frozen=frozen)
        saved_tokenizer = load_tokenizer(Path(model))
        check_vocabulary(saved_tokenizer, loaded_model.config, model)
    _check_experts(loaded_model.config, mesh)
    if isinstance(loaded_model, ScoringModel):
        raise ValueError(f"{model}: expected a language model, got a reward model with {loaded_model.outputs} outputs")
    if tokenizer is None:
        return loaded_model, saved_tokenizer
    own_tokenizer = load_tokenizer(tokenizer)
    check_vocabulary(own_tokenizer, loaded_model.config, tokenizer)
    return loaded_model, own_tokenizer


def _check_experts(config: ModelConfig, mesh: Mesh | None) -> None:
    """Beside a mixture, dense reward models may stand on a mesh with ep; alone, ep is a mistake."""
    if mesh is not None and mesh.ep.size > 1 and not config.experts:
        raise ValueError(f"mesh.ep: expected 1 for a model without experts, got {mesh.ep.size}")


def shard_model(
    empty: nn.Module, mesh: Mesh, sharding: Sharding | None, values: Any = (), *, frozen: bool = False
) -> Any:
    """A model on the meta device divided over a mesh and filled with (name, tensor) pairs."""
    if frozen:
        empty.requires_grad_(False)
    model = parallelize(empty, mesh, sharding)
    for name, value in values:
        sharded(model).load(name, value)
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
    shards = list(engine.weight_shards())
    with byte_bar(f"load {directory.path}", sum(values.nbytes for _, _, values in shards)) as bar:
        for name, start, values in shards:
            if not name.startswith("score."):
                directory.read(theirs + name.removeprefix(ours), start, values, spec=engine.shard_specs[name])
            elif not body_only:
                directory.read(name, start, values)
            bar.update(values.nbytes)
    engine.publish()


def load_sharded(path: Path, mesh: Mesh, sharding: Sharding | None, *, frozen: bool = False) -> Any:
    """The model of a directory divided over a mesh."""
    with ModelDirectory(path) as directory:
        model = shard_model(directory.empty_model(), mesh, sharding, frozen=frozen)
        fill(model, directory)
    return model


def scoring_start(
    source: str,
    tokenizer: Path | None,
    outputs: int,
    *,
    surprise: bool = False,
    seed: int,
    mesh: Mesh,
    sharding: Sharding | None,
) -> tuple[ScoringModel, Tokenizer]:
    """A scoring model whose body starts as a language model's (or as a scoring model's body); its head is fresh.

    Args:
        source: a directory, or a preset's name with a tokenizer, as for `language_model`.
    """
    is_preset = source in PRESETS and not Path(source).is_dir()
    if is_preset or not Path(source).is_dir():
        plain, loaded = language_model(source, tokenizer, seed=seed, device="cpu")
        return scoring_of(plain.config, outputs, surprise, mesh, sharding, plain.named_parameters()), loaded
    with ModelDirectory(Path(source)) as directory:
        loaded = load_tokenizer(tokenizer or Path(source))
        check_vocabulary(loaded, directory.config, tokenizer or source)
        model = scoring_of(directory.config, outputs, surprise, mesh, sharding)
        fill(model, directory, body_only=True)
    return model, loaded


def scoring_of(
    config: ModelConfig, outputs: int, surprise: bool, mesh: Mesh, sharding: Sharding | None, body: Any = ()
) -> ScoringModel:
    """A divided scoring model with a fresh head."""
    with torch.device("meta"):
        model = ScoringModel(config, outputs, surprise=surprise)
    model.score = scoring_head(config.width, outputs, surprise=surprise)
    return shard_model(model, mesh, sharding, ((f"body.{name}", value.detach()) for name, value in body))


def weights_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of weights that only generate; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def write_model(runtime: Runtime, model: Any, tokenizer: Tokenizer, path: Path, *, extra: dict | None = None) -> None:
    """Write a model's directory; every rank makes the call."""
    engine = sharded(model)
    if engine is not None and engine.is_sharded:
        save_sharded(model, path, runtime, tokenizer=tokenizer, extra=extra)
    else:
        from_main(runtime, lambda: save_model(model, tokenizer, path, extra=extra) and None)
