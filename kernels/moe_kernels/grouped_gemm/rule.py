"""Tiles for what no table has: much of the weights under way first, larger tiles as rows come."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from moe_kernels.device import DeviceProfile
from moe_kernels.grouped_gemm.tables import WEIGHTS, TableKey, TableRow
from moe_kernels.grouped_gemm.tiles import FEWEST_MULTIPROCESSORS, TileConfig
from moe_kernels.shapes import KernelShapes

_TINY_BOUND = 1.1  # rows an expert
_TINY_COLUMNS = (16, 8, 4)
_TINY_STAGE = 4096  # bytes that a program brings of one weight at once
_TINY_STAGES = 5


def rows_by_rule(profile: DeviceProfile, shapes: KernelShapes, dtype: torch.dtype) -> list[TableRow]:
    """Rows by rising `rows_per_expert` for experts' weights of `dtype`, as such a GPU can launch them."""
    capability = profile.compute_capability or (8, 0)
    weights = TableKey.of(shapes, dtype).weights
    wide = capability[0] in (9, 10)  # wgmma and tcgen05 need 64 rows on the left
    tma = capability >= (9, 0)
    # With mma.sync, float8 products are scaled in registers and would spill at a full block of scales.
    k = {"fp8": 128 if wide else 64, "bf16": 64, "fp32": 32}[weights]
    columns = 128 if wide or weights == "bf16" else 64
    widened = weights == "fp8" and capability < (8, 9)  # in registers, of which fewer are left

    # Programs that the registers of the prefill tiles leave room for, as compiled: one, and of these two.
    two_gate_ups = widened
    two_downs = widened or (wide and weights == "bf16") or (not wide and tma and weights == "fp8")

    def row(bound: float | None, regime: str, **tile: Any) -> TableRow:
        config, size = TileConfig(**{"block_k": k, **tile}), WEIGHTS[weights].itemsize
        prefill = regime == "prefill"
        gate_up = replace(config, programs=2 if prefill and two_gate_ups else 1)
        down = replace(config, programs=2 if prefill and two_downs else 1)
        return TableRow(
            rows_per_expert=bound,
            regime=regime,
            gate_up=gate_up.fitted(shapes.hidden_size, size, 2, profile),
            down=down.fitted(shapes.moe_intermediate_size, size, 1, profile),
        )

    block_m = 32 if widened else 64
    rows = [
        *_tiny_rows(profile, shapes, WEIGHTS[weights].itemsize),
        row(10, "decode", block_m=16, block_n=64, num_warps=4, num_stages=4, swap=wide),
        row(40, "decode", block_m=32, block_n=64, num_warps=4, num_stages=3, swap=wide),
    ]
    larger = wide and weights == "bf16"
    bound = 128 if larger else None
    rows.append(row(bound, "prefill", block_m=block_m, block_n=columns, num_warps=8, num_stages=3, tma=tma))
    if larger:
        rows.append(row(None, "prefill", block_m=128, block_n=128, num_warps=8, num_stages=3, tma=tma))
    return rows


def tiny_programs(
    num_tokens: int, shapes: KernelShapes, gate_up_columns: int, down_columns: int
) -> tuple[int, int]:
    """Programs of gate-up and of down that have work, when tokens choose uniformly and one choice is local at least."""
    choices = max(1.0, shapes.rows_per_expert(num_tokens) * shapes.num_local_experts)
    gate_ups = int(choices * math.ceil(shapes.moe_intermediate_size / gate_up_columns))
    return gate_ups, num_tokens * math.ceil(shapes.hidden_size / down_columns)


def _tiny_rows(profile: DeviceProfile, shapes: KernelShapes, element_size: int) -> list[TableRow]:
    """A program takes fewer columns where tokens are so few that multiprocessors would have nothing to do."""

    def columns(num_tokens: int) -> tuple[int, int]:
        wanted = profile.num_multiprocessors or FEWEST_MULTIPROCESSORS
        counts = {n: tiny_programs(num_tokens, shapes, n, n) for n in _TINY_COLUMNS}
        narrowest = _TINY_COLUMNS[-1]
        gate_up, down = (
            next((n for n in _TINY_COLUMNS if counts[n][part] >= wanted), narrowest) for part in (0, 1)
        )
        return gate_up, down

    def row(bound: float, num_tokens: int) -> TableRow:
        gate_up, down = columns(num_tokens)
        return TableRow(
            rows_per_expert=bound,
            regime="tiny",
            gate_up=_tiny_tile(gate_up, shapes.hidden_size, element_size, 2, profile),
            down=_tiny_tile(down, shapes.moe_intermediate_size, element_size, 1, profile),
        )

    last = max(1, int(_TINY_BOUND / max(shapes.rows_per_expert(1), 1e-3)))
    # Bounds lie between two numbers of tokens, where no rounding matters.
    narrow = [
        row(round((shapes.rows_per_expert(t) + shapes.rows_per_expert(t + 1)) / 2, 6), t)
        for t in range(1, last)
        if columns(t) != columns(t + 1)
    ]
    return [*narrow, row(_TINY_BOUND, last)]


def _tiny_tile(
    columns: int, depth: int, element_size: int, weight_tiles: int, profile: DeviceProfile
) -> TileConfig:
    """As many bytes in a stage whatever the columns, in two stages at least: one alone is not brought ahead."""
    deepest = 1 << max(depth // 2, 16).bit_length() - 1
    block_k = min(_TINY_STAGE // (columns * element_size), deepest)
    num_stages = min(_TINY_STAGES, math.ceil(depth / block_k) + 1)
    tile = TileConfig(block_m=1, block_n=columns, block_k=block_k, num_warps=4, num_stages=num_stages)
    return tile.fitted(depth, element_size, weight_tiles, profile)
