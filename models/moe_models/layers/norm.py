"""RMSNorm as a layer: the weight, and how it is applied."""

from __future__ import annotations

import torch
from torch import nn

from moe_kernels.norm import rms_norm
from moe_kernels.select import Choice
from moe_models.layers.linear import empty_parameter


class ZeroCenteredRMSNorm(nn.Module):
    """RMSNorm over the last dimension whose checkpoint weight is the distance from 1."""

    def __init__(self, size: int, eps: float, choice: Choice) -> None:
        super().__init__()
        self.weight = empty_parameter(size)
        self.eps = eps
        self.implementation = choice.implementation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as x."""
        return rms_norm(x, self.weight, self.eps, True, implementation=self.implementation)
