"""Norms and rotary positions: the operations that touch each value once.

Shape legend: T tokens, N query heads, M key heads, D head size, R rotary size (even, at most D).
"""

from __future__ import annotations

import torch

from moe_kernels.implementations import find_implementation

_RMS_NORM = {
    "reference": "moe_kernels.norm.reference:rms_norm",
    "cpu": "moe_kernels.norm.cpu:rms_norm",
    "triton": "moe_kernels.norm.triton:rms_norm",
}
_RMS_NORM_GATED = {
    "reference": "moe_kernels.norm.reference:rms_norm_gated",
    "cpu": "moe_kernels.norm.cpu:rms_norm_gated",
    "triton": "moe_kernels.norm.triton:rms_norm_gated",
}
_APPLY_ROTARY = {
    "reference": "moe_kernels.norm.reference:apply_rotary",
    "cpu": "moe_kernels.norm.cpu:apply_rotary",
    "triton": "moe_kernels.norm.triton:apply_rotary",
}
_SILU_AND_MUL = {
    "reference": "moe_kernels.norm.reference:silu_and_mul",
    "cpu": "moe_kernels.norm.cpu:silu_and_mul",
    "triton": "moe_kernels.norm.triton:silu_and_mul",
}


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    zero_centered: bool,
    *,
    implementation: str = "reference",
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times weight, or 1 + weight where `zero_centered`.

    Computed in float32 (float64 for float64) and rounded once, to x's dtype.
    """
    return find_implementation("norm", _RMS_NORM, implementation)(x, weight, eps, zero_centered)


def rms_norm_gated(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    implementation: str = "reference",
) -> torch.Tensor:
    """The norm of x, times weight, times SiLU(gate); x and gate have one shape, weight its last dimension.

    Rounded as Qwen3-Next was trained: the norm in float32, its result and the product with the weight in x's
    dtype, the product with the gate in float32, then x's dtype again.
    """
    return find_implementation("norm", _RMS_NORM_GATED, implementation)(x, gate, weight, eps)


def apply_rotary(
    q_TND: torch.Tensor,
    k_TMD: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    *,
    implementation: str = "reference",
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k with their first R dimensions turned by each token's angles, the others as they were.

    Dimension i is paired with i + R/2, so cos and sin (in q's dtype) repeat their first half in the second.
    """
    return find_implementation("norm", _APPLY_ROTARY, implementation)(q_TND, k_TMD, cos_TR, sin_TR)


def silu_and_mul(gate_up: torch.Tensor, *, implementation: str = "reference") -> torch.Tensor:
    """silu(gate) * up, where the last dimension holds all of gate and then all of up."""
    return find_implementation("norm", _SILU_AND_MUL, implementation)(gate_up)
