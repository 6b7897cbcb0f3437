"""Sampling of a step: parameters of each sequence, the copy of tokens to the host, likeliest tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from .scheduler import Sampling, Sequence, next_uniforms
from .staging import copy_to_host

Top = list[tuple[int, float]]


class Draws(NamedTuple):
    """Sampling parameters of the next token of a batch of sequences.

    arrays: uniform, temperature (B,) fp32, top_k (B,) int32, top_p (B,) fp32, to be staged.
    truncates: whether any row has a top_k, and a top_p.
    alike: the settings, if all rows have the same; else None.
    """

    arrays: tuple[Tensor, ...]
    truncates: tuple[bool, bool]
    alike: tuple[float, int | None, float | None] | None

    @classmethod
    def of(cls, grown_rows: list[tuple[Sequence, int]]) -> "Draws":
        """Parameters of the next tokens of these sequences, which come with their rows."""
        grown = [sequence for sequence, _ in grown_rows]
        samplings = [s.sampling for s in grown]
        arrays = (
            torch.tensor(next_uniforms(grown), dtype=torch.float32),
            torch.tensor([s.temperature for s in samplings], dtype=torch.float32),
            torch.tensor([s.top_k or 0 for s in samplings], dtype=torch.int32),
            torch.tensor([1.0 if s.top_p is None else s.top_p for s in samplings], dtype=torch.float32),
        )
        truncates = any(s.top_k for s in samplings), any(s.top_p not in (None, 1.0) for s in samplings)
        kinds = {(float(s.temperature), s.top_k or None, s.top_p) for s in samplings}
        return cls(arrays, truncates, kinds.pop() if len(kinds) == 1 else None)

    def options(self, staged: list[Tensor]) -> dict:
        """Arguments of `kernels.sample`; on a CPU scalars where all rows are alike."""
        uniform, temperature, top_k, top_p = staged
        if self.alike is not None and not uniform.is_cuda:
            return {"uniform": uniform, **dict(zip(("temperature", "top_k", "top_p"), self.alike))}
        kept = (x if is_used else None for x, is_used in zip((top_k, top_p), self.truncates))
        return {"uniform": uniform, "temperature": temperature, **dict(zip(("top_k", "top_p"), kept))}


class Flight(NamedTuple):
    """Sampled tokens of a step, in an asynchronous copy to the host.

    tops: row -> its likeliest tokens and their log-probabilities, for rows that report them.
    """

    grown: list[Sequence]
    tokens: Tensor
    logprobs: Tensor
    tops: dict[int, tuple[Tensor, Tensor]]
    arrived: torch.cuda.Event | None

    @classmethod
    def of(
        cls,
        grown: list[Sequence],
        tokens: Tensor,
        logprobs: Tensor,
        tops: dict[int, tuple[Tensor, Tensor] | None],
    ) -> "Flight":
        """Start the copy of what was sampled; `tops`: copies of what `likeliest` returned, begun before."""
        sent = copy_to_host(tokens), copy_to_host(logprobs)
        arrived = None
        if tokens.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        return cls(grown, *sent, tops, arrived)

    def read(self) -> list[tuple[Sequence, int, float, tuple[Tensor, Tensor] | None]]:
        """Sequence, token, log-probability and likeliest tokens of each row; waits for the copy."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tops = [self.tops.get(i) for i in range(len(self.grown))] if self.tops else [None] * len(self.grown)
        return list(zip(self.grown, self.tokens.tolist(), self.logprobs.tolist(), tops))


def likeliest(logits_V: Tensor, sampling: Sampling, token: Tensor, logprob: Tensor) -> tuple[Tensor, Tensor]:
    """Likeliest tokens and their log-probabilities under the distribution that the token was sampled from."""
    logprobs_V = (logits_V.float() / (sampling.temperature or 1.0)).log_softmax(-1)
    values, tokens = logprobs_V.topk(min(sampling.top_logprobs, logprobs_V.shape[0]))
    # A truncated distribution is the full one divided by the mass that is kept.
    return tokens, values + (logprob.float() - logprobs_V.index_select(0, token.view(1)))


def kept(sampling: Sampling, tokens: Tensor, values: Tensor) -> Top:
    """The likeliest tokens that truncation and the mask of allowed ids keep."""
    values, tokens = (x[values > -torch.inf] for x in (values, tokens))
    if sampling.temperature and (sampling.top_k or sampling.top_p not in (None, 1.0)):
        before = values.exp().cumsum(0) - values.exp()
        values, tokens = (x[before < 1 - 1e-5] for x in (values, tokens))
    return list(zip(tokens.tolist(), values.tolist()))
