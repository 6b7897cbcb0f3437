"""What a step draws: how, for every sequence; the tokens on their way to the host; the likeliest ones beside them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .scheduler import Sampling, Sequence, next_uniforms
from .staging import on_its_way

Top = list[tuple[int, float]]


class Draws(NamedTuple):
    """How the next token of some sequences is drawn.

    arrays: uniform, temperature (B,) fp32, top_k (B,) int32, top_p (B,) fp32, to be staged.
    truncates: whether any row has a top_k, and a top_p: where none does, nothing is looked for.
    alike: the settings, where all rows have the same.
    """

    arrays: tuple[Tensor, ...]
    truncates: tuple[bool, bool]
    alike: tuple[float, int | None, float | None] | None

    @classmethod
    def of(cls, grown: list[Sequence]) -> "Draws":
        """Those of the next tokens of some sequences."""
        hows = [s.sampling for s in grown]
        arrays = (
            torch.tensor(next_uniforms(grown), dtype=torch.float32),
            torch.tensor([h.temperature for h in hows], dtype=torch.float32),
            torch.tensor([h.top_k or 0 for h in hows], dtype=torch.int32),
            torch.tensor([1.0 if h.top_p is None else h.top_p for h in hows], dtype=torch.float32),
        )
        truncates = any(h.top_k for h in hows), any(h.top_p not in (None, 1.0) for h in hows)
        kinds = {(float(h.temperature), h.top_k or None, h.top_p) for h in hows}
        return cls(arrays, truncates, kinds.pop() if len(kinds) == 1 else None)

    def options(self, staged: list[Tensor]) -> dict:
        """Arguments of `kernels.sample`; on a CPU plain numbers where all rows are alike."""
        uniform, temperature, top_k, top_p = staged
        if self.alike is not None and not uniform.is_cuda:
            return {"uniform": uniform, **dict(zip(("temperature", "top_k", "top_p"), self.alike))}
        kept = (x if wanted else None for x, wanted in zip((top_k, top_p), self.truncates))
        return {"uniform": uniform, "temperature": temperature, **dict(zip(("top_k", "top_p"), kept))}


class Flight(NamedTuple):
    """Tokens that a step has drawn, on their way to the host.

    tops: of rows that report their likeliest tokens, these and their log-probabilities.
    """

    grown: list[Sequence]
    tokens: Tensor
    logprobs: Tensor
    tops: dict[int, tuple[Tensor, Tensor]]
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, grown: list[Sequence], logits: Tensor, tokens: Tensor, logprobs: Tensor) -> "Flight":
        """Sends what was drawn from (B, V) logits on its way."""
        tops = {
            i: tuple(on_its_way(x) for x in likeliest(logits[i], s.sampling, tokens[i], logprobs[i]))
            for i, s in enumerate(grown)
            if s.sampling.top_logprobs
        }
        sent = on_its_way(tokens), on_its_way(logprobs)
        arrived = None
        if tokens.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        return cls(grown, *sent, tops, arrived)

    def read(self) -> list[tuple[int, float, Top | None]]:
        """Token, log-probability and likeliest tokens of each row, once they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        rows = enumerate(zip(self.grown, self.tokens.tolist(), self.logprobs.tolist()))
        return [
            (token, logprob, kept(s.sampling, *self.tops[i]) if i in self.tops else None)
            for i, (s, token, logprob) in rows
        ]


def likeliest(logits_V: Tensor, how: Sampling, token: Tensor, logprob: Tensor) -> tuple[Tensor, Tensor]:
    """Likeliest tokens and their log-probabilities, under the distribution that a token was drawn from."""
    every = (logits_V.float() / (how.temperature or 1.0)).log_softmax(-1)
    values, tokens = every.topk(min(how.top_logprobs, every.shape[0]))
    # A truncated distribution is the whole one over the mass of what is kept.
    return tokens, values + (logprob.float() - every.index_select(0, token.view(1)))


def kept(how: Sampling, tokens: Tensor, values: Tensor) -> Top:
    """Those of the likeliest tokens that truncation leaves."""
    if how.temperature and (how.top_k or how.top_p not in (None, 1.0)):
        before = values.exp().cumsum(0) - values.exp()
        values, tokens = (x[before < 1 - 1e-5] for x in (values, tokens))
    return list(zip(tokens.tolist(), values.tolist()))
