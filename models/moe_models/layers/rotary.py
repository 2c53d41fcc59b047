"""Rotary position angles of a step's tokens, made once and used by all full-attention layers."""

from __future__ import annotations

import torch


def rotary_cos_sin(
    positions_T: torch.Tensor, rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos_TR, sin_TR) in `dtype`, R = rotary_dim, even; angles in float32, second half as the first.

    Frequencies are computed here and not kept as a buffer, so that a model built on `meta` has nothing but
    parameters to fill.
    """
    steps = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_T.device)
    angles = positions_T[:, None].float() * (1.0 / theta ** (steps / rotary_dim))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
