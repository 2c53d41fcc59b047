"""Token embedding, which may double as the output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from moe_kernels.linear import linear
from moe_kernels.select import Choice
from moe_models.layers.linear import empty_parameter


class Embedding(nn.Module):
    """A row of [V, H] for each token id."""

    def __init__(self, vocab_size: int, hidden_size: int, choice: Choice) -> None:
        super().__init__()
        self.choice = choice  # of the product in `logits`
        self.weight = empty_parameter(vocab_size, hidden_size)

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """x_TH of int64 ids in [0, V)."""
        return F.embedding(token_ids_T, self.weight)

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """[N, V]: the embedding used as output projection, where a checkpoint ties the two."""
        choice = self.choice
        return linear(hidden_NH, self.weight, implementation=choice.implementation, launch=choice.launch)
