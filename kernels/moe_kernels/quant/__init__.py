"""Weights in fewer bits: int8 with a scale for each row, float8 with a scale for each block of 128 x 128.

Shape legend: N output features, K input features; any dimensions may stand before them (experts).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

BLOCK = 128


def scale_shape(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of the float32 scales of a weight [..., N, K] kept in `dtype`: [..., N], or a factor a block.

    Raises ValueError for a dtype that is neither int8 nor float8_e4m3fn.
    """
    if dtype == torch.int8:
        return tuple(shape[:-1])
    if dtype == torch.float8_e4m3fn:
        return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))
    raise _not_scaled(dtype)


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [..., N, K], float32 scale [..., N]); symmetric, the largest of each row becomes 127."""
    weight = weight.float()
    scale = weight.abs().amax(dim=-1) / 127
    codes = (weight / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round().to(torch.int8)
    return codes, scale


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [..., N, K], float32 scale [..., ceil(N/128), ceil(K/128)]), as in FP8 checkpoints."""
    weight = weight.float()
    *_, rows, columns = scale_shape(weight.shape, torch.float8_e4m3fn)
    padded = weight.new_zeros(*weight.shape[:-2], rows * BLOCK, columns * BLOCK)
    padded[..., : weight.shape[-2], : weight.shape[-1]] = weight
    blocks = padded.unflatten(-1, (columns, BLOCK)).unflatten(-3, (rows, BLOCK))
    scale = blocks.abs().amax(dim=(-3, -1)) / torch.finfo(torch.float8_e4m3fn).max
    codes = weight / _per_element(scale.clamp_min(torch.finfo(torch.float32).tiny), weight.shape)
    return codes.to(torch.float8_e4m3fn), scale


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight that the codes stand for, in `dtype`; which format it is follows from the weight's dtype.

    Raises ValueError for a dtype that is neither int8 nor float8_e4m3fn.
    """
    if weight.dtype == torch.int8:
        return (weight.float() * scale[..., None]).to(dtype)
    if weight.dtype == torch.float8_e4m3fn:
        return (weight.float() * _per_element(scale, weight.shape)).to(dtype)
    raise _not_scaled(weight.dtype)


def _not_scaled(dtype: torch.dtype) -> ValueError:
    return ValueError(f"a scaled weight is {dtype}; wanted torch.int8 or torch.float8_e4m3fn")


def _per_element(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    scale = scale.repeat_interleave(BLOCK, dim=-2).repeat_interleave(BLOCK, dim=-1)
    return scale[..., : shape[-2], : shape[-1]]
