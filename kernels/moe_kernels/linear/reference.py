"""The product in plain torch: the specification of `linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from moe_kernels.quant import dequantize


def linear(x: torch.Tensor, weight_NK: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """See `moe_kernels.linear.linear`."""
    return F.linear(x, weight_NK if scale is None else dequantize(weight_NK, scale, x.dtype))


def linear_float32(
    x: torch.Tensor, weight_NK: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """The same, computed in float32: torch's bfloat16 product takes fifty times longer on many CPUs."""
    weight = weight_NK.float() if scale is None else dequantize(weight_NK, scale, torch.float32)
    return F.linear(x.float(), weight).to(x.dtype)
