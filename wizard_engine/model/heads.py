"""A transformer with a small linear head instead of the vocabulary: reward models and critics."""

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .transformer import Transformer


class ScoringModel(nn.Module):
    """Body of a transformer and a (D -> outputs) head with bias, applied to every position.

    outputs = 1 scores an instruction or a state (instruction reward model, critic); outputs = 3 gives the logits of
    the step labels wrong, neutral, right (process reward model).
    """

    def __init__(self, config: ModelConfig, outputs: int) -> None:
        super().__init__()
        self.config = config
        self.outputs = outputs
        self.body = Transformer(config)
        self.score = nn.Linear(config.width, outputs)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    @classmethod
    def from_language_model(cls, model: Transformer, outputs: int) -> "ScoringModel":
        """A scoring model whose body starts as a copy of `model`; the head starts at zero."""
        scoring = cls(model.config, outputs)
        scoring.body.load_state_dict(model.state_dict())
        return scoring.to(next(model.parameters()).device)

    def forward(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """(T, outputs) fp32 scores at every position."""
        hidden_TD = self.body(tokens, positions, cu_seqlens, max_seqlen)
        return torch.nn.functional.linear(hidden_TD.float(), self.score.weight.float(), self.score.bias.float())
