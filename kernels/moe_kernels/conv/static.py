"""The launches of the convolution kernels as values, to be compiled with no GPU there."""

from __future__ import annotations

import torch

from moe_kernels.conv.triton import (
    DECODE_CHANNELS,
    PREFILL_CHANNELS,
    PREFILL_TOKENS,
    conv_sizes,
    decode_kernel,
    prefill_kernel,
)
from moe_kernels.sequences import PREFILL_CHUNK
from moe_kernels.shapes import KernelShapes
from moe_kernels.static_launch import StaticLaunch, TensorArgument

WIDTH = 4  # taps, in every model of this kind


def static_launches(
    shapes: KernelShapes, dtype: torch.dtype, capability: tuple[int, int]
) -> list[StaticLaunch]:
    """The decode and the prefill; none for a model without such layers."""
    values = shapes.num_value_heads * shapes.value_size
    channels = 2 * shapes.num_key_heads * shapes.key_size + values
    if not channels:
        return []
    x, i32 = TensorArgument(dtype), TensorArgument(torch.int32)
    tensors = {"x": x, "weight": x, "state": x, "slots": TensorArgument(torch.int64), "out": x}
    tables = {"tiles": i32, "sequences": i32, "checkpoints": i32}
    stride = {"x_stride": channels + values}  # the layer's gate stands beside the channels
    sizes = conv_sizes(channels, WIDTH)
    decode = StaticLaunch(
        name="conv.decode",
        kernel=decode_kernel,
        arguments={**tensors, **stride},
        constants={**sizes, "BLOCK_C": DECODE_CHANNELS},
        num_warps=4,
        num_stages=3,
        tile=f"{DECODE_CHANNELS}",
        bytes_per_stage=0,
        mma=False,
        bytes_at_once=2 * WIDTH * DECODE_CHANNELS * dtype.itemsize,  # taps; state and input
    )
    prefill = StaticLaunch(
        name="conv.prefill",
        kernel=prefill_kernel,
        arguments={**tensors, **tables, **stride},
        constants={**sizes, "TILE": PREFILL_CHUNK, "BLOCK_T": PREFILL_TOKENS, "BLOCK_C": PREFILL_CHANNELS},
        num_warps=4,
        num_stages=3,
        tile=f"{PREFILL_TOKENS}x{PREFILL_CHANNELS}",
        bytes_per_stage=0,
        mma=False,
    )
    return [decode, prefill]
