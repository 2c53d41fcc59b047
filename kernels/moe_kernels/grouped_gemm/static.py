"""Every launch of the experts' kernels that a model's shapes can lead to, for compilation with no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moe_kernels.aot.occupancy import MULTIPROCESSORS
from moe_kernels.device import DeviceProfile
from moe_kernels.grouped_gemm import align, sorted_rows, tiny
from moe_kernels.grouped_gemm.launch import Bucket, GroupedGemmLaunch, choose, launch_of_rows
from moe_kernels.grouped_gemm.rule import tiny_programs
from moe_kernels.grouped_gemm.tables import TableRow
from moe_kernels.grouped_gemm.tiles import PREFILL, REGIMES, TINY, TileConfig
from moe_kernels.grouped_gemm.triton import SUM_BLOCK
from moe_kernels.grouped_gemm.weights import BYTES, NATIVE, PLAIN
from moe_kernels.shapes import KernelShapes
from moe_kernels.static_launch import DescriptorArgument, StaticLaunch, TensorArgument

_NO_LIMIT = 2**62
_INDEX = TensorArgument(torch.int32)
_IDS = TensorArgument(torch.int64)
_SCALE = TensorArgument(torch.float32)


def static_launches(
    shapes: KernelShapes, dtype: torch.dtype, capability: tuple[int, int]
) -> list[StaticLaunch]:
    """`dtype` is the experts' weights'; with float8_e4m3fn the activations are bfloat16."""
    profile = profile_of(capability)
    return _of_launch(choose(profile, shapes, dtype)[0], shapes, dtype)


def launches_of_rows(
    rows: Sequence[TableRow], shapes: KernelShapes, dtype: torch.dtype, capability: tuple[int, int]
) -> list[StaticLaunch]:
    """Of a table's rows as they stand: none is made to fit, and none is for more rows than may come."""
    profile = replace(profile_of(capability), shared_memory_per_block_optin=_NO_LIMIT)
    return _of_launch(launch_of_rows(rows, profile, replace(shapes, max_tokens=0), dtype), shapes, dtype)


def profile_of(capability: tuple[int, int]) -> DeviceProfile:
    """Of a GPU that need not be there; what nobody has written down of it is left open."""
    limits = MULTIPROCESSORS.get(capability)
    return DeviceProfile(
        kind="cuda",
        name=f"sm_{capability[0]}{capability[1]}",
        total_memory=0,
        compute_capability=capability,
        shared_memory_per_block_optin=None if limits is None else limits.shared_memory_per_block,
        num_multiprocessors=None if limits is None else limits.count,
    )


def _of_launch(launch: GroupedGemmLaunch, shapes: KernelShapes, dtype: torch.dtype) -> list[StaticLaunch]:
    return [
        static
        for bucket in launch.variants()
        for static in _of_bucket(bucket, launch.fewest_rows(bucket), shapes, dtype, launch.native_fp8)
    ]


def _of_bucket(
    bucket: Bucket, fewest_rows: int, shapes: KernelShapes, dtype: torch.dtype, native: bool
) -> list[StaticLaunch]:
    is_fp8 = dtype == torch.float8_e4m3fn
    is_tiny = bucket.regime == TINY
    mode = PLAIN if not is_fp8 else NATIVE if native and not is_tiny else BYTES
    model = torch.bfloat16 if is_fp8 else dtype
    codes = TensorArgument(torch.float8_e4m3fn if mode == NATIVE else model)
    plain = TensorArgument(model)
    weight = TensorArgument(torch.uint8 if mode == BYTES else dtype)
    scale = _SCALE if is_fp8 else plain
    x_scale = _SCALE if mode == NATIVE else plain
    sizes: dict[str, Any] = {"H": shapes.hidden_size, "F": shapes.moe_intermediate_size, "MODE": mode}
    top_k, local = {"TOP_K": shapes.top_k}, {"L": shapes.num_local_experts}
    gate_up: dict[str, Any]
    down: dict[str, Any]
    if is_tiny:
        gate_up = {"x": plain, "w": weight, "w_scale": scale, "ids": _IDS, "h": plain}
        down = {"h": plain, "w": weight, "w_scale": scale, "ids": _IDS, "weights": plain, "y": plain}
        launches = [
            _launch("gate_up", bucket, tiny.gate_up_tiny, gate_up, sizes | top_k, bucket.gate_up, weight),
            _launch("down", bucket, tiny.down_tiny, down, sizes | top_k, bucket.down, weight),
        ]
        counts = tiny_programs(fewest_rows, shapes, bucket.gate_up.block_n, bucket.down.block_n)
        depths = (2 * shapes.hidden_size, shapes.moe_intermediate_size)  # gate's and up's in one loop
        return [
            replace(
                launch, num_programs=count, loop_bytes=launch.constants["BN"] * depth * weight.dtype.itemsize
            )
            for launch, count, depth in zip(launches, counts, depths, strict=True)
        ]
    sizes |= local | {"PRECISION": "ieee" if model == torch.float32 else "tf32"}
    order = {"choices": _INDEX, "offsets": _INDEX, "tiles": _INDEX}
    gate_up = {
        "x": codes,
        "x_scale": x_scale,
        "w": weight,
        "w_scale": scale,
        **order,
        "h": plain,
        "bound": int,
    }
    down = {"h": codes, "h_scale": x_scale, "w": weight, "w_scale": scale, "weights": plain, **order}
    return [
        *_align(bucket, shapes),
        _launch("gate_up", bucket, sorted_rows.gate_up, gate_up, sizes | top_k, bucket.gate_up, weight),
        _launch(
            "down", bucket, sorted_rows.down, down | {"y": plain, "bound": int}, sizes, bucket.down, weight
        ),
        _helper(
            "sum",
            sorted_rows.sum_choices,
            {"rows": plain, "ids": _IDS, "y": plain},
            {"H": shapes.hidden_size, "BLOCK": SUM_BLOCK, **top_k},
            str(SUM_BLOCK),
        ),
    ]


def _launch(
    part: str,
    bucket: Bucket,
    kernel: Any,
    arguments: dict[str, Any],
    sizes: dict[str, Any],
    tile: TileConfig,
    weight: TensorArgument,
) -> StaticLaunch:
    blocks: dict[str, Any] = {"BN": tile.block_n, "BK": tile.block_k}
    is_tiny = bucket.regime == TINY
    if is_tiny:
        blocks["STAGES"] = tile.num_stages
    else:
        blocks |= {"BM": tile.block_m, "SWAP": tile.swap, "TMA": tile.tma}
        blocks["SPECIALIZE"] = tile.warp_specialize
        if tile.tma:
            described = DescriptorArgument(weight.dtype, (tile.block_n, tile.block_k))
            arguments = arguments | {"w": described}
    weight_tiles = 2 if part == "gate_up" else 1
    return StaticLaunch(
        name=f"grouped_gemm.{part} {REGIMES[bucket.regime]}",
        kernel=kernel,
        arguments=arguments,
        constants=sizes | blocks,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        tile=str(tile),
        bytes_per_stage=weight_tiles * tile.block_n * tile.block_k * weight.dtype.itemsize,
        mma=not is_tiny and weight.dtype != torch.float32,
        persistent_programs=tile.programs if bucket.regime == PREFILL else 0,
    )


def _align(bucket: Bucket, shapes: KernelShapes) -> list[StaticLaunch]:
    """Of one program, and of several."""
    local, block_m = shapes.num_local_experts, bucket.gate_up.block_m
    bins = {"L": local, "BINS": align.num_bins(local)}
    laid_out = {"cursors": _INDEX, "offsets": _INDEX, "tiles": _INDEX, "bound": int}
    sorted_ids = {"ids": _IDS, "cursors": _INDEX, "choices": _INDEX, "num_choices": int}
    block, tile = {"BLOCK": align.BLOCK}, {"BLOCK_M": block_m}
    return [
        _helper(
            "align", align.align_one, sorted_ids | laid_out, bins | block | tile, str(block_m), align.WARPS
        ),
        _helper(
            "align count",
            align.count,
            {"ids": _IDS, "counts": _INDEX, "num_choices": int},
            bins | block,
            str(align.BLOCK),
        ),
        _helper("align lay_out", align.lay_out, laid_out, bins | tile, str(block_m)),
        _helper("align scatter", align.scatter, sorted_ids, block, str(align.BLOCK)),
    ]


def _helper(
    part: str,
    kernel: Any,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    tile: str,
    num_warps: int = 4,
) -> StaticLaunch:
    """A kernel beside the products."""
    return StaticLaunch(
        name=f"grouped_gemm.{part}",
        kernel=kernel,
        arguments=arguments,
        constants=constants,
        num_warps=num_warps,
        num_stages=3,
        tile=tile,
        bytes_per_stage=0,
        mma=False,
    )
