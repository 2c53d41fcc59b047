"""The launches of the norms and their kin as values, to be compiled with no GPU there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton

from moe_kernels.norm.triton import (
    SILU_BLOCK,
    norm_sizes,
    rms_norm_gated_kernel,
    rms_norm_kernel,
    rotary_kernel,
    rotary_sizes,
    silu_and_mul_kernel,
)
from moe_kernels.shapes import KernelShapes
from moe_kernels.static_launch import StaticLaunch, TensorArgument

EPS = 1e-6


def static_launches(
    shapes: KernelShapes, dtype: torch.dtype, capability: tuple[int, int]
) -> list[StaticLaunch]:
    """The norm of a layer's input, and the others where the model has layers that need them."""
    launches = [_norm("norm.rms_norm hidden", dtype, shapes.max_tokens, 1, shapes.hidden_size)]
    if shapes.num_heads:
        rows = shapes.max_tokens * shapes.num_heads
        launches.append(_norm("norm.rms_norm heads", dtype, rows, shapes.num_heads, shapes.head_size))
        launches.append(_rotary(shapes, dtype))
    if shapes.num_value_heads:
        launches.append(_gated(shapes, dtype))
    launches.append(_silu(shapes.moe_intermediate_size, dtype))
    return launches


def _launch(
    name: str,
    kernel: Any,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    tile: str,
) -> StaticLaunch:
    return StaticLaunch(
        name=name,
        kernel=kernel,
        arguments=arguments,
        constants={key: value for key, value in constants.items() if key != "num_warps"},
        num_warps=constants.get("num_warps", 4),
        num_stages=3,
        tile=tile,
        bytes_per_stage=0,
        mma=False,
    )


def _norm(name: str, dtype: torch.dtype, num_rows: int, inner: int, size: int) -> StaticLaunch:
    x, sizes = TensorArgument(dtype), norm_sizes(size)
    strides = {"outer_stride": inner * size, "inner_stride": size if inner > 1 else 0}
    arguments = {"x": x, "weight": x, "out": x, "num_rows": num_rows, "inner": inner, **strides, "eps": EPS}
    tile = f"{sizes['ROWS']}x{sizes['BLOCK']}"
    return _launch(name, rms_norm_kernel, arguments, {**sizes, "ZERO_CENTERED": True}, tile)


def _gated(shapes: KernelShapes, dtype: torch.dtype) -> StaticLaunch:
    x, heads, size = TensorArgument(dtype), shapes.num_value_heads, shapes.value_size
    arguments: dict[str, Any] = {"x": x, "gate": x, "weight": x, "out": x}
    arguments |= {"num_rows": shapes.max_tokens * heads, "inner": heads}
    arguments |= {"x_outer_stride": heads * size, "x_inner_stride": size}
    # The gate is the end of a projection's rows.
    row = 2 * (shapes.num_key_heads * shapes.key_size + heads * size)
    arguments |= {"gate_outer_stride": row, "gate_inner_stride": size, "eps": EPS}
    sizes = norm_sizes(size)
    tile = f"{sizes['ROWS']}x{sizes['BLOCK']}"
    return _launch("norm.rms_norm_gated", rms_norm_gated_kernel, arguments, sizes, tile)


def _rotary(shapes: KernelShapes, dtype: torch.dtype) -> StaticLaunch:
    x, heads, key_heads, size = TensorArgument(dtype), shapes.num_heads, shapes.num_kv_heads, shapes.head_size
    arguments: dict[str, Any] = dict.fromkeys(("q", "k", "cos", "sin", "q_out", "k_out"), x)
    arguments |= {"q_token_stride": heads * size, "q_head_stride": size}
    arguments |= {"k_token_stride": key_heads * size, "k_head_stride": size}
    sizes = rotary_sizes(heads, key_heads, size, size // 4)  # a quarter is turned, as in Qwen3-Next
    return _launch("norm.rotary", rotary_kernel, arguments, sizes, f"{sizes['HEADS']}x{size}")


def _silu(size: int, dtype: torch.dtype) -> StaticLaunch:
    x, block = TensorArgument(dtype), min(SILU_BLOCK, triton.next_power_of_2(size))
    arguments = {"gate_up": x, "out": x, "row_stride": 2 * size}
    return _launch(
        "norm.silu_and_mul", silu_and_mul_kernel, arguments, {"F": size, "BLOCK": block}, f"{block}"
    )
