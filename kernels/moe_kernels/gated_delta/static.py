"""The launches of the Gated DeltaNet kernels as values, to be compiled with no GPU there."""

from __future__ import annotations

import torch
import triton

from moe_kernels.gated_delta.decode import decode_kernel
from moe_kernels.gated_delta.launch import GatedDeltaLaunch, default_launch
from moe_kernels.gated_delta.prefill import padded_block, prefill_sizes, prepare_kernel, scan_kernel
from moe_kernels.gated_delta.triton import GATES_BLOCK, gates_kernel
from moe_kernels.sequences import PREFILL_CHUNK
from moe_kernels.shapes import KernelShapes
from moe_kernels.static_launch import StaticLaunch, TensorArgument


def static_launches(
    shapes: KernelShapes, dtype: torch.dtype, capability: tuple[int, int]
) -> list[StaticLaunch]:
    """The decode, both parts of the prefill and the gates; none for a model without such layers."""
    if not shapes.num_value_heads:
        return []
    launch = default_launch(dtype)
    return [
        _decode(shapes, dtype, launch),
        _prepare(shapes, dtype, launch),
        _scan(shapes, dtype, launch),
        _gates(shapes, dtype),
    ]


def _token_stride(shapes: KernelShapes) -> int:
    """q, k and v stand side by side in the convolution's result."""
    return 2 * shapes.num_key_heads * shapes.key_size + shapes.num_value_heads * shapes.value_size


def _decode(shapes: KernelShapes, dtype: torch.dtype, launch: GatedDeltaLaunch) -> StaticLaunch:
    x, f32, stride = TensorArgument(dtype), TensorArgument(torch.float32), _token_stride(shapes)
    block_v = min(launch.decode_block_v, triton.next_power_of_2(shapes.value_size))
    arguments = {"q": x, "k": x, "v": x, "decay": f32, "beta": x, "state": f32}
    arguments |= {"slots": TensorArgument(torch.int64), "out": x}
    return StaticLaunch(
        name="gated_delta.decode",
        kernel=decode_kernel,
        arguments={**arguments, "q_stride": stride, "k_stride": stride, "v_stride": stride},
        constants={
            "KEY_HEADS": shapes.num_key_heads,
            "VALUE_HEADS": shapes.num_value_heads,
            "D": shapes.key_size,
            "V": shapes.value_size,
            "BLOCK_D": triton.next_power_of_2(shapes.key_size),
            "BLOCK_V": block_v,
        },
        num_warps=launch.decode_warps,
        num_stages=3,
        tile=f"{shapes.key_size}x{block_v}",
        bytes_per_stage=0,
        mma=False,
        bytes_at_once=shapes.key_size * block_v * 4,  # of the state
    )


def _prepare(shapes: KernelShapes, dtype: torch.dtype, launch: GatedDeltaLaunch) -> StaticLaunch:
    x, f32, stride = TensorArgument(dtype), TensorArgument(torch.float32), _token_stride(shapes)
    arguments = {"q": x, "k": x, "v": x, "decay": f32, "beta": x, "chunks": TensorArgument(torch.int32)}
    arguments |= {"w": x, "u": x, "scores": x, "factors": f32}
    strides = {"q_stride": stride, "k_stride": stride, "v_stride": stride}
    return StaticLaunch(
        name="gated_delta.prepare",
        kernel=prepare_kernel,
        arguments={**arguments, "num_tokens": shapes.max_tokens, **strides},
        constants={**_sizes(shapes, dtype), "BLOCK": launch.prepare_block},
        num_warps=launch.prepare_warps,
        num_stages=launch.prepare_stages,
        tile=f"{PREFILL_CHUNK}x{PREFILL_CHUNK}x{launch.prepare_block}",
        bytes_per_stage=2 * PREFILL_CHUNK * launch.prepare_block * dtype.itemsize,
        mma=dtype != torch.float32,
    )


def _scan(shapes: KernelShapes, dtype: torch.dtype, launch: GatedDeltaLaunch) -> StaticLaunch:
    x, f32, i32 = (TensorArgument(t) for t in (dtype, torch.float32, torch.int32))
    stride, block_v = _token_stride(shapes), padded_block(launch.scan_block_v, shapes.value_size)
    arguments = {"q": x, "k": x, "w": x, "u": x, "scores": x, "factors": f32, "chunks": i32, "sequences": i32}
    arguments |= {"state": f32, "slots": TensorArgument(torch.int64), "out": x}
    block_d = max(16, triton.next_power_of_2(shapes.key_size))
    return StaticLaunch(
        name="gated_delta.scan",
        kernel=scan_kernel,
        arguments={**arguments, "num_tokens": shapes.max_tokens, "q_stride": stride, "k_stride": stride},
        constants={**_sizes(shapes, dtype), "BLOCK_D": block_d, "BLOCK_V": block_v},
        num_warps=launch.scan_warps,
        num_stages=launch.scan_stages,
        tile=f"{PREFILL_CHUNK}x{block_d}x{block_v}",
        # q, k, w, u and the scores of a chunk.
        bytes_per_stage=PREFILL_CHUNK * (3 * block_d + block_v + PREFILL_CHUNK) * dtype.itemsize,
        mma=dtype != torch.float32,
    )


def _gates(shapes: KernelShapes, dtype: torch.dtype) -> StaticLaunch:
    x, f32, heads = TensorArgument(dtype), TensorArgument(torch.float32), shapes.num_value_heads
    tensors = {"a": x, "b": x, "a_log": f32, "dt_bias": f32, "decay": f32, "beta": x}
    sizes = {"num_values": shapes.max_tokens * heads, "a_stride": 2 * heads, "b_stride": 2 * heads}
    return StaticLaunch(
        name="gated_delta.gates",
        kernel=gates_kernel,
        arguments={**tensors, **sizes},
        constants={"N": heads, "BLOCK": GATES_BLOCK},
        num_warps=4,
        num_stages=3,
        tile=f"{GATES_BLOCK}",
        bytes_per_stage=0,
        mma=False,
    )


def _sizes(shapes: KernelShapes, dtype: torch.dtype) -> dict[str, int | str]:
    heads = (shapes.num_key_heads, shapes.num_value_heads)
    return prefill_sizes(*heads, shapes.key_size, shapes.value_size, dtype)
