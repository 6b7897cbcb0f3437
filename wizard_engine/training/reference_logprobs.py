"""Log-probabilities of answers under the reference model of Stage-DPO, in a cache on disk."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from wizard_engine.data.samples import Pair
from wizard_engine.generation import divided_logprobs
from wizard_engine.model import Transformer
from wizard_engine.parallel import Mesh, sharded
from wizard_engine.runtime.files import content_hash, write_bytes
from wizard_engine.runtime.metrics import byte_bar
from wizard_engine.runtime.object_collectives import gather_objects

# Of the files; 1 had no checksum, and its values are computed again.
VERSION = 2
AGAIN = "remove it, and its log-probabilities are computed again"


class ReferenceCache:
    """Reference log-probabilities on disk, under a key of all they depend on.

    The key covers the weights, every token id and loss weight, the tokenizer, the precision and the normalisation.
    """

    def __init__(self, directory: Path, tokenizer_fingerprint: str, normalise: bool, *, quiet: bool = False) -> None:
        self.directory, self.tokenizer, self.normalise = Path(directory), tokenizer_fingerprint, normalise
        self.quiet = quiet

    def key(self, model: Transformer, pairs: Sequence[Pair]) -> str:
        """Hash of everything that the log-probabilities depend on."""
        digest = hashlib.sha256()
        engine = sharded(model)
        if engine is not None and engine.is_sharded:
            shards = [(f"{n} {start} {x.dtype}", x) for n, start, x in engine.weight_shards(exact=False)]
            digest.update(repr(gather_objects(_digest(shards).hexdigest())).encode())
        else:
            parameters = model.named_parameters()
            digest = _digest([(f"{n} {tuple(x.shape)} {x.dtype}", x) for n, x in parameters])
        for sample in (side for pair in pairs for side in (pair.chosen, pair.rejected)):
            digest.update(sample.tokens.tobytes())
            digest.update(sample.weights.tobytes())
        rest = {
            "version": VERSION,
            "tokenizer": self.tokenizer,
            "normalise": self.normalise,
            "config": str(model.config),
        }
        return content_hash({"model": digest.hexdigest(), **rest})[:32]

    def logprobs(self, model: Transformer, pairs: Sequence[Pair]) -> Tensor:
        """(N, 2) fp32 log-probabilities of the chosen and rejected answers under `model`, nats; computed once."""
        file = self.directory / f"{self.key(model, pairs)}.safetensors"
        is_cached = gather_objects(file.exists())
        if all(is_cached):
            return _read(file, len(pairs))
        logprobs = self._computed(model, pairs)
        write_bytes(file, save({"logprobs": logprobs}, metadata={"checksum": _checksum(logprobs)}))
        return logprobs

    def _computed(self, model: Transformer, pairs: Sequence[Pair]) -> Tensor:
        """Log-probabilities of all pairs; the data ranks of a divided model compute a subset each."""
        engine = sharded(model)
        mesh = Mesh(torch.device("cpu")) if engine is None else engine.mesh
        samples = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        desc = "" if self.quiet else "reference log-probabilities"
        values = divided_logprobs(model, samples, mesh, mean=self.normalise, desc=desc)
        return torch.tensor(values, dtype=torch.float32).view(2, -1).T.contiguous()


def _digest(named: Sequence[tuple[str, Tensor]]) -> Any:
    """SHA-256 of tensors with their names."""
    digest = hashlib.sha256()
    with byte_bar("key of the reference", sum(values.nbytes for _, values in named)) as bar:
        for name, values in named:
            digest.update(name.encode())
            digest.update(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            bar.update(values.nbytes)
    return digest


def _checksum(logprobs: Tensor) -> str:
    return hashlib.sha256(logprobs.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _read(file: Path, pairs: int) -> Tensor:
    """The log-probabilities in a file of the cache.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            logprobs, stated = opened.get_tensor("logprobs"), (opened.metadata() or {}).get("checksum")
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, got {error}; {AGAIN}") from None
    if logprobs.shape != (pairs, 2) or logprobs.dtype != torch.float32 or _checksum(logprobs) != stated:
        raise ValueError(f"{file}: corrupt: its values do not fit their checksum; {AGAIN}")
    return logprobs
