"""Linear layer without bias, made uninitialised for weights that are loaded."""

from __future__ import annotations

import torch
from torch import nn

from moe_kernels.blocks import Weight
from moe_kernels.linear import linear
from moe_kernels.quant import scale_shape
from moe_kernels.select import Choice


def empty_parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised parameter that takes no gradient, on the default device and in the default dtype."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


def empty_weight(*shape: int, kept_in: torch.dtype | None) -> tuple[nn.Parameter, nn.Parameter | None]:
    """An uninitialised weight [..., N, K], and its float32 scales if it is kept in int8 or float8_e4m3fn."""
    weight = empty_parameter(*shape, dtype=kept_in)
    if kept_in is None:
        return weight, None
    return weight, empty_parameter(*scale_shape(shape, kept_in), dtype=torch.float32)


class Linear(nn.Module):
    """x @ weight^T, with weight [out_features, in_features] as in checkpoints, or quantised as `choice` says."""

    def __init__(self, in_features: int, out_features: int, choice: Choice) -> None:
        super().__init__()
        self.choice = choice
        self.weight, self.weight_scale = empty_weight(out_features, in_features, kept_in=choice.weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        choice = self.choice
        return linear(
            x, self.weight, self.weight_scale, implementation=choice.implementation, launch=choice.launch
        )

    def as_weight(self) -> Weight:
        """What a whole layer in one call takes."""
        return Weight(self.weight, self.weight_scale)
