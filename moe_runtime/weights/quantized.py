"""Quantised weights on their way in: the scales of FP8 checkpoints, and where those of parameters lie."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from moe_kernels.quant import BLOCK, quantize_int8, scale_shape
from moe_runtime.weights.index import CheckpointIndex, TensorEntry

FLOAT8 = "F8_E4M3"  # safetensors' name of the only float8 that is read
SCALE_DTYPES = ("F32", "F16", "BF16")
# Elements that are quantised at once: what bounds the float32 copies beside the parameter.
_CHUNK_ELEMENTS = 1 << 22

Index = tuple[int | slice, ...]


def scale_name(name: str) -> str:
    """The tensor of an FP8 checkpoint that holds the scales of the tensor `name`."""
    return f"{name}_scale_inv"


def scale_faults(index: CheckpointIndex, names: Iterable[str]) -> list[str]:
    """What is wrong with the scales of those of the tensors `names` that are float8; each fault in words."""
    faults = []
    for name in names:
        if index[name].dtype != FLOAT8:
            continue
        scale = index.get(scale_name(name))
        wanted = scale_shape(index[name].shape, torch.float8_e4m3fn)
        if scale is None:
            faults.append(f"{name} is {FLOAT8} and {scale_name(name)} is missing")
        elif scale.shape != wanted or scale.dtype not in SCALE_DTYPES:
            faults.append(
                f"{scale_name(name)} is {scale.dtype} {list(scale.shape)}, wanted {list(wanted)} in one of "
                f"{', '.join(SCALE_DTYPES)}"
            )
    return faults


def scale_index(index: Index, entry: TensorEntry) -> Index:
    """What to read of the scales of a float8 tensor of which `index` is read: whole matrices alone."""
    assert len(index) <= len(entry.shape) - 2, f"{index} cuts through blocks of scales of {list(entry.shape)}"
    return index


def store_int8(codes: torch.Tensor, scale: torch.Tensor, values: torch.Tensor) -> None:
    """Quantise `values` [..., N, K] into views of a parameter and of its scales [..., N], part by part."""
    rows = max(1, _CHUNK_ELEMENTS * values.shape[0] // max(values.numel(), 1))
    parts = zip(codes.split(rows), scale.split(rows), values.split(rows), strict=True)
    for codes_part, scale_part, values_part in parts:
        found_codes, found_scale = quantize_int8(values_part.to(codes.device))
        codes_part.copy_(found_codes)
        scale_part.copy_(found_scale)


def block_index(index: Index, num_dims: int) -> Index:
    """Where the scales of the part `index` of a float8 parameter of `num_dims` dimensions lie.

    The part's edges must be edges of blocks, or of the parameter.
    """
    return tuple(item if dim < num_dims - 2 else _blocks(item) for dim, item in enumerate(index))


def _blocks(item: int | slice) -> slice:
    assert isinstance(item, slice), f"{item} cuts a row out of a block of scales"
    start, stop = item.start or 0, item.stop
    assert start % BLOCK == 0, f"{item} begins inside a block of scales"
    return slice(start // BLOCK, None if stop is None else -(-stop // BLOCK))
