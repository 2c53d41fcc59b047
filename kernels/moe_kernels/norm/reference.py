"""Root-mean-square norms and rotary positions in plain torch: the specification of this operation."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from moe_kernels.numerics import accumulation_dtype


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool) -> torch.Tensor:
    """See `moe_kernels.norm.rms_norm`."""
    dtype = accumulation_dtype(x.dtype)
    scale = weight.to(dtype) + 1.0 if zero_centered else weight.to(dtype)
    return (_normalize(x, eps) * scale).to(x.dtype)


def rms_norm_gated(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `moe_kernels.norm.rms_norm_gated`."""
    scaled = weight * _normalize(x, eps).to(x.dtype)
    return (scaled * F.silu(gate.to(accumulation_dtype(x.dtype)))).to(x.dtype)


def apply_rotary(
    q_TND: torch.Tensor, k_TMD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `moe_kernels.norm.apply_rotary`."""
    cos_T1R, sin_T1R = cos_TR[:, None], sin_TR[:, None]
    return _rotate(q_TND, cos_T1R, sin_T1R), _rotate(k_TMD, cos_T1R, sin_T1R)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `moe_kernels.norm.silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.to(accumulation_dtype(x.dtype))
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _rotate(x_TND: torch.Tensor, cos_T1R: torch.Tensor, sin_T1R: torch.Tensor) -> torch.Tensor:
    turned, kept = x_TND.tensor_split([cos_T1R.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos_T1R + torch.cat([-second, first], dim=-1) * sin_T1R, kept], dim=-1)
