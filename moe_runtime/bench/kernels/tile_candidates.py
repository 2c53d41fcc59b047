"""Tiles that `bench kernels --tune` tries: those that can make sense for so many rows an expert.

Shape legend: M rows of one expert, N output columns, K depth of one stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from moe_kernels.device import DeviceProfile
from moe_kernels.grouped_gemm.tiles import TileConfig

_ROWS = (16, 32, 64, 128)
_DEPTH = 16  # of a weight's rows: any whose rows a descriptor can describe
_WIDE_MMA_ROWS = 64  # that wgmma and tcgen05 need on the left


def sorted_tiles(
    profile: DeviceProfile, rows_per_expert: float, element_size: int, weight_tiles: int, *, persistent: bool
) -> Iterator[TileConfig]:
    """For the kernels that sort rows by expert; `weight_tiles` is 2 for gate and up, 1 for down.

    Only what serving would launch as it is: whatever needs more shared memory would be made to fit there.
    """
    capability = profile.compute_capability or (8, 0)
    has_wide_mma = capability[0] in (9, 10)
    # One tile should hold most experts' rows without being much larger than they are.
    rows = [m for m in _ROWS if m <= max(16, 4 * rows_per_expert) and 4 * m >= min(rows_per_expert, 512)]
    for m, n, k, warps, stages in itertools.product(
        rows, (32, 64, 128, 256), (64, 128), (4, 8), (2, 3, 4, 5)
    ):
        plain = TileConfig(block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages)
        accumulators = m * n * weight_tiles // (32 * warps)  # registers of a thread
        if accumulators > 128 or not _fits(plain, element_size, weight_tiles, profile):
            continue
        swaps = (False, True) if has_wide_mma and m < _WIDE_MMA_ROWS <= n else (False,)
        copies = (False, True) if capability >= (9, 0) else (False,)
        counts = (1, 2) if persistent else (1,)
        specialized = (False, True) if persistent else (False,)
        for swap, tma, special, programs in itertools.product(swaps, copies, specialized, counts):
            tile = replace(plain, swap=swap, tma=tma, warp_specialize=special, programs=programs)
            if _fits(tile, element_size, weight_tiles, profile):
                yield tile


def tiny_tiles(profile: DeviceProfile, element_size: int, weight_tiles: int) -> Iterator[TileConfig]:
    """For the kernels that take rows one by one."""
    for n, k, warps, stages in itertools.product(
        (4, 8, 16, 32, 64), (64, 128, 256, 512), (1, 2, 4, 8), (3, 5)
    ):
        tile = TileConfig(block_m=1, block_n=n, block_k=k, num_warps=warps, num_stages=stages)
        values = n * k // (32 * warps)  # of a weight tile, a thread
        if 4 <= values <= 64 and _fits(tile, element_size, weight_tiles, profile):
            yield tile


def _fits(tile: TileConfig, element_size: int, weight_tiles: int, profile: DeviceProfile) -> bool:
    """Whether serving would launch it as it is."""
    return tile.fitted(_DEPTH, element_size, weight_tiles, profile) == tile
