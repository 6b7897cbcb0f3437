"""A transformer with a small linear head instead of the vocabulary: reward models and critics."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear_logprob import linear_logprob
from kernels.shared_prefix import Prefixes

from .config import ModelConfig
from .mixture import Routes
from .transformer import Transformer

LAGS = 8
CLIP_NATS = 8.0
HIDDEN = 64


def _hidden_layer(inputs: int) -> nn.Linear:
    """(inputs -> HIDDEN) layer whose weights do not depend on the state of any global generator."""
    layer = nn.Linear(inputs, HIDDEN)
    if layer.weight.is_meta:
        return layer
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / inputs**0.5)
        layer.bias.zero_()
    return layer


def scoring_head(width: int, outputs: int, *, surprise: bool) -> nn.Module:
    """From hidden states, and surprises, to scores, which start at zero."""
    last = nn.Linear(HIDDEN if surprise else width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(_hidden_layer(width + 2 * LAGS + 2), nn.GELU(), last) if surprise else last


class ScoringModel(nn.Module):
    """Body of a transformer and a linear head with bias instead of the vocabulary, applied to every position.

    outputs = 1 scores an instruction or a state (instruction reward model, critic); outputs = 3 gives the logits of the
    step labels wrong, neutral, right (process reward model).

    With `surprise`, the head has a hidden layer and also sees how unlikely the body, read as a language model, finds
    the last tokens: a slip in a step is a token that the model itself would hardly write. A small body learns that
    comparison slowly, and training it spoils the language model that it needs: it is frozen, the head alone learns.
    """

    def __init__(self, config: ModelConfig, outputs: int, *, surprise: bool = False) -> None:
        super().__init__()
        self.config, self.outputs, self.surprise = config, outputs, surprise
        self.body = Transformer(config)
        self.score = scoring_head(config.width, outputs, surprise=surprise)
        self.body.requires_grad_(not surprise)

    @classmethod
    def from_language_model(cls, model: Transformer, outputs: int, *, surprise: bool = False) -> "ScoringModel":
        """A scoring model whose body starts as a copy of `model`; the head starts at zero."""
        scoring = cls(model.config, outputs, surprise=surprise)
        scoring.body.load_state_dict(model.state_dict())
        return scoring.to(next(model.parameters()).device)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | Prefixes,
        max_seqlen: int,
        routes: Routes | None = None,
    ) -> Tensor:
        """(T, outputs) fp32 (of a float64 model float64) scores at every position; arguments as for Transformer.

        Where several ranks divide the tokens of a row each scores its own, and all of them get all scores.
        """
        hidden_TD = self.body(tokens, positions, cu_seqlens, max_seqlen, routes, own_tokens=True)
        wide_TD = hidden_TD if hidden_TD.dtype == torch.float64 else hidden_TD.float()
        if self.surprise:
            wide_TD = torch.cat((wide_TD, self._surprises(hidden_TD.detach(), tokens, positions, cu_seqlens)), dim=-1)
        return self.body.parallel.gather_tokens(self.score(wide_TD), tokens.shape[0])

    @torch.no_grad()
    def _surprises(self, hidden_TD: Tensor, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor | Prefixes) -> Tensor:
        """(t, 2 LAGS + 2) of this rank's tokens: surprise in nats and scaled probability of each of the last LAGS
        tokens, and the extremes.

        The first token of a sequence, and lags before it, count as certain.
        """
        parallel, body = self.body.parallel, self.body
        hidden_TD, count = parallel.gather_over_tp(hidden_TD), tokens.shape[0]
        if isinstance(cu_seqlens, Prefixes):
            previous_T = F.pad(cu_seqlens.previous, (0, count - cu_seqlens.tokens))
            before_TD = parallel.pick(hidden_TD, previous_T)
            logprob_T, _ = linear_logprob(before_TD, body.head_weight, tokens, shard=body.shard)
        else:
            previous_T = torch.arange(-1, count - 1, device=tokens.device).clamp(min=0)
            following_T = torch.cat((tokens[1:], tokens.new_full((1,), -1)))
            logprob, _ = linear_logprob(hidden_TD, body.head_weight, following_T, shard=body.shard)
            logprob_T = logprob.roll(1)
        logprob_T = logprob_T.masked_fill_(positions == 0, 0.0)
        lagged, place_T = [], torch.arange(count, device=tokens.device)
        for lag in range(LAGS):
            lagged.append(logprob_T[place_T].masked_fill(positions < lag, 0.0))
            place_T = previous_T[place_T]
        logprob_TK = torch.stack(lagged, dim=1)
        surprise_TK, probability_TK = -logprob_TK.clamp(min=-CLIP_NATS), CLIP_NATS * logprob_TK.exp()
        extremes = (surprise_TK.amax(1, keepdim=True), probability_TK.amin(1, keepdim=True))
        return parallel.shard_tokens(torch.cat((surprise_TK, probability_TK, *extremes), dim=1))
