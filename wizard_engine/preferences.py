"""What Stage-DPO needs beside the loss: slices in an order, answer log-probabilities, a cache of the reference's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .data.samples import Pair
from .files import content_hash
from .model import Transformer
from .parallel import gather_objects, sharded
from .rollout import sequence_logprobs

ORDERS = ("random", "easy_first", "hard_first", "by_gap")


def order_slices(pairs: Sequence[Pair], slices: int, order: str, seed: int) -> list[list[int]]:
    """Indices of the pairs in each slice, near-equal in number.

    easy_first and hard_first go by the length of the chosen answer; by_gap by the judge's score gap, largest first.

    Raises:
        ValueError: fewer pairs than slices, or an unknown order.
    """
    if not 1 <= slices <= len(pairs):
        raise ValueError(f"slices: expected 1 to {len(pairs)} (the pairs), got {slices}")
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {ORDERS}, got {order}")
    shuffled = np.random.default_rng(seed).permutation(len(pairs))
    lengths = np.asarray([float(pair.chosen.weights.sum()) for pair in pairs])
    gaps = np.asarray([pair.margin for pair in pairs])
    key = {"random": np.zeros(len(pairs)), "easy_first": lengths, "hard_first": -lengths, "by_gap": -gaps}[order]
    ranked = shuffled[np.argsort(key[shuffled], kind="stable")]
    return [part.tolist() for part in np.array_split(ranked, slices)]


class ReferenceCache:
    """Reference log-probabilities on disk, under a key of all they depend on.

    The key covers the weights, every token id and loss weight, the tokenizer, the precision and the normalisation.
    """

    def __init__(self, directory: Path, tokenizer_fingerprint: str, normalise: bool) -> None:
        self.directory, self.tokenizer, self.normalise = Path(directory), tokenizer_fingerprint, normalise

    def key(self, model: Transformer, pairs: Sequence[Pair]) -> str:
        """Hash of everything that the log-probabilities depend on."""
        import hashlib

        digest = hashlib.sha256()
        engine = sharded(model)
        if engine is not None and engine.is_divided:
            parts = hashlib.sha256()
            for name, start, values in engine.weight_parts(exact=False):
                parts.update(f"{name} {start} {values.dtype}".encode())
                parts.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            digest.update(repr(gather_objects(parts.hexdigest())).encode())
        else:
            for name, parameter in model.named_parameters():
                digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
                digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for sample in (side for pair in pairs for side in (pair.chosen, pair.rejected)):
            digest.update(sample.tokens.tobytes())
            digest.update(sample.weights.tobytes())
        rest = {"tokenizer": self.tokenizer, "normalise": self.normalise, "config": str(model.config)}
        return content_hash({"model": digest.hexdigest(), **rest})[:32]

    def logprobs(self, model: Transformer, pairs: Sequence[Pair]) -> Tensor:
        """(N, 2) fp32 log-probabilities of the chosen and rejected answers under `model`, nats; computed once."""
        file = self.directory / f"{self.key(model, pairs)}.safetensors"
        found = gather_objects(file.exists())
        if all(found):
            return load_file(file)["logprobs"]
        logprobs = self._computed(model, pairs)
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{torch.randint(2**31, ()).item()}.partial")
        save_file({"logprobs": logprobs}, partial)
        partial.rename(file)
        return logprobs

    def _computed(self, model: Transformer, pairs: Sequence[Pair]) -> Tensor:
        """Of a divided model each rank computes its share of the pairs."""
        engine = sharded(model)
        rank, size = 0, 1
        if engine is not None and engine.is_divided:
            rank, size = engine.mesh.data.index, engine.mesh.data.size
        own = pairs[rank::size]
        samples = [pair.chosen for pair in own] + [pair.rejected for pair in own]
        values = sequence_logprobs(model, samples, mean=self.normalise)
        logprobs = torch.tensor(values, dtype=torch.float32).view(2, -1).T.contiguous()
        if size == 1:
            return logprobs
        out = torch.empty(len(pairs), 2)
        for other, part in gather_objects((rank, logprobs.tolist())):
            out[other::size] = torch.tensor(part).view(-1, 2)
        return out
