"""The launches of the attention kernels as values, to be compiled with no GPU there."""

from __future__ import annotations

import torch

from moe_kernels.attention.decode import REDUCE_SPLITS, decode_kernel, reduce_kernel
from moe_kernels.attention.launch import AttentionLaunch, launch_for
from moe_kernels.attention.prefill import prefill_kernel
from moe_kernels.attention.softmax import attention_sizes
from moe_kernels.attention.triton import write_kernel, write_sizes
from moe_kernels.shapes import KernelShapes
from moe_kernels.static_launch import StaticLaunch, TensorArgument

BLOCK_SIZE = 16  # tokens in a block of the cache, if nobody says otherwise
_I32, _F32 = TensorArgument(torch.int32), TensorArgument(torch.float32)


def static_launches(
    shapes: KernelShapes, dtype: torch.dtype, capability: tuple[int, int]
) -> list[StaticLaunch]:
    """The write, both parts of the decode and the prefill, with a gate; none for a model without such layers."""
    if not shapes.num_heads:
        return []
    launch = launch_for(capability, 1, dtype, shapes.head_size)
    return [
        _write(shapes, dtype),
        _decode(shapes, dtype, launch),
        _reduce(shapes, dtype),
        _prefill(shapes, dtype, launch),
    ]


def _projected(shapes: KernelShapes) -> int:
    """q, gate, k and v stand side by side in the projection's result."""
    return 2 * (shapes.num_heads + shapes.num_kv_heads) * shapes.head_size


def _strides(shapes: KernelShapes) -> dict[str, int]:
    return {"q_stride": shapes.num_heads * shapes.head_size, "gate_stride": _projected(shapes)}


def _write(shapes: KernelShapes, dtype: torch.dtype) -> StaticLaunch:
    x, sizes = TensorArgument(dtype), write_sizes(shapes.num_kv_heads, shapes.head_size)
    tensors = {"k": x, "v": x, "k_cache": x, "v_cache": x, "slots": TensorArgument(torch.int64)}
    return StaticLaunch(
        name="attention.write",
        kernel=write_kernel,
        arguments={**tensors, "k_stride": sizes["VALUES"], "v_stride": _projected(shapes)},
        constants=sizes,
        num_warps=4,
        num_stages=3,
        tile=f"{sizes['BLOCK']}",
        bytes_per_stage=0,
        mma=False,
    )


def _decode(shapes: KernelShapes, dtype: torch.dtype, launch: AttentionLaunch) -> StaticLaunch:
    x, sizes = TensorArgument(dtype), _sizes(shapes, dtype)
    tensors = {"q": x, "k_cache": x, "v_cache": x, "tables": _I32, "contexts": _I32, "gate": x, "out": x}
    scratch = {"partial": _F32, "partial_log": _F32}
    numbers = {"table_stride": 100, "split_tokens": 256, "num_splits": 7}
    blocks = launch.decode_blocks(shapes.num_heads // shapes.num_kv_heads)
    return StaticLaunch(
        name="attention.decode",
        kernel=decode_kernel,
        arguments={**tensors, **scratch, **numbers, **_strides(shapes), "scale_log2": 0.1},
        constants={**sizes, "HAS_GATE": True, **blocks},
        num_warps=launch.decode_warps,
        num_stages=launch.decode_stages,
        tile=f"{blocks['BLOCK_R']}x{blocks['BLOCK_S']}x{sizes['BLOCK_D']}",
        # k and v.
        bytes_per_stage=2 * blocks["BLOCK_S"] * shapes.head_size * dtype.itemsize,
        mma=dtype != torch.float32,
        small_mma=True,  # the query heads of one key head are fewer than 64 rows
    )


def _reduce(shapes: KernelShapes, dtype: torch.dtype) -> StaticLaunch:
    x, sizes = TensorArgument(dtype), _sizes(shapes, dtype)
    tensors = {"partial": _F32, "partial_log": _F32, "contexts": _I32, "gate": x, "out": x}
    numbers = {"split_tokens": 256, "num_splits": 7, "gate_stride": _projected(shapes)}
    kept = {name: sizes[name] for name in ("HEADS", "D", "BLOCK_D")}
    return StaticLaunch(
        name="attention.reduce",
        kernel=reduce_kernel,
        arguments={**tensors, **numbers},
        constants={**kept, "HAS_GATE": True, "BLOCK_P": REDUCE_SPLITS},
        num_warps=4,
        num_stages=3,
        tile=f"{REDUCE_SPLITS}x{sizes['BLOCK_D']}",
        bytes_per_stage=0,
        mma=False,
    )


def _prefill(shapes: KernelShapes, dtype: torch.dtype, launch: AttentionLaunch) -> StaticLaunch:
    x, sizes = TensorArgument(dtype), _sizes(shapes, dtype)
    tensors = {"q": x, "k_cache": x, "v_cache": x, "tables": _I32, "contexts": _I32, "gate": x, "out": x}
    work = {"tiles": _I32, "sequences": _I32}
    blocks = launch.prefill_blocks(shapes.num_heads // shapes.num_kv_heads)
    return StaticLaunch(
        name="attention.prefill",
        kernel=prefill_kernel,
        arguments={**tensors, **work, "table_stride": 100, **_strides(shapes), "scale_log2": 0.1},
        constants={**sizes, "HAS_GATE": True, **blocks},
        num_warps=launch.prefill_warps,
        num_stages=launch.prefill_stages,
        tile=f"{blocks['BLOCK_R']}x{blocks['BLOCK_S']}x{sizes['BLOCK_D']}",
        # k and v.
        bytes_per_stage=2 * blocks["BLOCK_S"] * shapes.head_size * dtype.itemsize,
        mma=dtype != torch.float32,
    )


def _sizes(shapes: KernelShapes, dtype: torch.dtype) -> dict[str, int | str]:
    return attention_sizes(shapes.num_heads, shapes.num_kv_heads, shapes.head_size, BLOCK_SIZE, dtype)
