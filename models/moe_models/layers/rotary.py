"""Rotary position angles of a step's tokens, made once and used by all full-attention layers."""

from __future__ import annotations

import torch

_FEWEST_POSITIONS = 1024


def rotary_cos_sin(
    positions_T: torch.Tensor, rotary_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos_TR, sin_TR) in `dtype`, R = rotary_dim, even; angles in float32, second half as the first.

    Nothing of it is a buffer, so that a model built on `meta` has nothing but parameters to fill.
    """
    steps = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_T.device)
    angles = positions_T[:, None].float() * (1.0 / theta ** (steps / rotary_dim))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class RotaryTable:
    """The angles of all positions up to the furthest one, made as they are asked for.

    On CPUs the ten small operations that make a step's angles take a percent of a small model's step.
    """

    def __init__(self, rotary_dim: int, theta: float) -> None:
        self._rotary_dim, self._theta = rotary_dim, theta
        self._cos_PR = self._sin_PR = torch.empty(0, rotary_dim, device="cpu")

    def __call__(
        self, positions_T: torch.Tensor, end: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos_TR, sin_TR) of positions below `end`, as `rotary_cos_sin` gives them."""
        if positions_T.device.type != "cpu":
            return rotary_cos_sin(positions_T, self._rotary_dim, self._theta, dtype)
        if end > self._cos_PR.shape[0] or dtype != self._cos_PR.dtype:
            positions_P = torch.arange(max(_FEWEST_POSITIONS, 1 << end.bit_length()))
            self._cos_PR, self._sin_PR = rotary_cos_sin(positions_P, self._rotary_dim, self._theta, dtype)
        return self._cos_PR[positions_T], self._sin_PR[positions_T]
