"""`bench kernels --tune`: search the experts' tiles on this GPU and write the best into the shipped tables.

For each number of rows an expert, gate-up's tile is searched first and then down's. A row that is faster than the one
that serving has now is written as soon as it is found, so that a search that was interrupted has not been in vain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from moe_kernels.aot.occupancy import MULTIPROCESSORS
from moe_kernels.device import DeviceProfile
from moe_kernels.grouped_gemm.rule import rows_by_rule
from moe_kernels.grouped_gemm.tables import TableKey, TableRow, load_rows, save_rows
from moe_kernels.grouped_gemm.tiles import TileConfig
from moe_kernels.shapes import KernelShapes
from moe_runtime.bench.kernels.gpu import layers_of, rank_shapes
from moe_runtime.bench.kernels.gpu_experts import FLOAT8, ExpertWeights
from moe_runtime.bench.kernels.row_timer import RowTimer
from moe_runtime.bench.kernels.tile_candidates import sorted_tiles, tiny_tiles
from moe_runtime.bench.report import Report, TextTable, load_average
from moe_runtime.errors import ConfigError

# Up to how many rows an expert a table's row is for; None: any number. Measured at each bound.
_BOUNDS: tuple[float | None, ...] = (0.02, 0.05, 0.3, 1.1, 4, 10, 20, 40, 80, None)
_ROWS_WITHOUT_BOUND = 320.0
_TINY_BOUND = 1.1  # rows an expert, above which taking rows one by one reads weights twice
_DECODE_BOUND = 40  # above which programs are persistent
_DTYPES = {"bf16": torch.bfloat16, "fp8": FLOAT8}

Measure = Callable[[TableRow], float]  # seconds; inf where the GPU cannot run it


def run_tune(expert_parallel_size: int, num_rounds: int = 9) -> Report:
    """Search for one of `expert_parallel_size` ranks of Qwen3-Next-80B, and write what was found.

    Raises:
        ConfigError: there is no table for this GPU's architecture.
    """
    from tqdm import tqdm

    profile = DeviceProfile.query("cuda")
    if profile.compute_capability not in MULTIPROCESSORS:
        raise ConfigError(f"there are no tile tables for {profile}; --tune knows NVIDIA GPUs from sm_80 on")
    shapes, started_load = rank_shapes(expert_parallel_size), load_average()
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for kind, dtype in _DTYPES.items():
            layers = layers_of(shapes, dtype, profile)
            make_scales_uneven(layers)
            for bound in tqdm(_BOUNDS, desc=f"{kind}: rows an expert"):
                num_tokens = max(1, round((bound or _ROWS_WITHOUT_BOUND) / shapes.rows_per_expert(1)))
                timer = RowTimer(profile, shapes, dtype, layers, num_tokens=num_tokens, num_rounds=num_rounds)
                results.append(_tune_bound(bound, profile, shapes, dtype, timer) | {"weights": kind})
    return Report(
        benchmark="kernels --tune",
        device=str(profile),
        started_load=started_load,
        workload={"expert_parallel_size": expert_parallel_size, "num_rounds": num_rounds},
        results=results,
        tables=[_table(results)],
    )


def make_scales_uneven(layers: Sequence[ExpertWeights]) -> None:
    """Give each block of 128 x 128 a scale of its own: a tile that takes another block's is then found out."""
    for layer in layers:
        for scale in (layer.gate_up_scale, layer.down_scale):
            if scale is not None:
                scale.mul_(torch.rand_like(scale) + 0.5)


def _tune_bound(
    bound: float | None, profile: DeviceProfile, shapes: KernelShapes, dtype: torch.dtype, timer: RowTimer
) -> dict[str, Any]:
    """Search, and write what is faster than what serving has."""
    key = TableKey.of(shapes, dtype)
    known = load_rows(profile.architecture, key) or rows_by_rule(profile, shapes, dtype)
    present = row_for(known, bound)
    best = replace(search(bound, profile, dtype, timer)[0], source=f"timed on {profile.name}")
    # Both anew, one after the other: the least of a search's many times is in part luck.
    seconds, present_seconds = timer(best), timer(present)
    if seconds < present_seconds:
        save_rows(profile.architecture, key, with_row(known, best))
    return {
        **asdict(best),
        "us": _microseconds(seconds),
        "present_us": _microseconds(present_seconds),
        "written": seconds < present_seconds,
        "discarded": timer.discarded,
    }


def _microseconds(seconds: float) -> float | None:
    """None for what could not be timed."""
    return round(1e6 * seconds, 2) if math.isfinite(seconds) else None


def row_for(rows: Sequence[TableRow], rows_per_expert: float | None) -> TableRow:
    """The one of `rows` that serves so many rows an expert; None: more than any."""
    wanted = math.inf if rows_per_expert is None else rows_per_expert
    return next(row for row in rows if row.rows_per_expert is None or wanted <= row.rows_per_expert)


def with_row(rows: Sequence[TableRow], new: TableRow) -> list[TableRow]:
    """`rows` with `new` in place of the one for as many rows an expert, or at its place among them."""
    kept = [row for row in rows if row.rows_per_expert != new.rows_per_expert]
    return sorted([*kept, new], key=lambda row: row.rows_per_expert or math.inf)


def search(
    bound: float | None, profile: DeviceProfile, dtype: torch.dtype, measure: Measure
) -> tuple[TableRow, float]:
    """The fastest row for up to `bound` rows an expert, and its seconds."""
    rows_per_expert = bound or _ROWS_WITHOUT_BOUND
    regimes = {"decode" if rows_per_expert <= _DECODE_BOUND else "prefill": _sorted_pairs}
    if rows_per_expert <= _TINY_BOUND:
        regimes["tiny"] = _tiny_pairs
    found = []
    for regime, pairs in regimes.items():
        gate_ups, downs_for = pairs(profile, rows_per_expert, dtype.itemsize)
        seconds_of = {}
        for tile in gate_ups:
            down = _plainest(downs_for(tile))
            row = TableRow(rows_per_expert=bound, regime=regime, gate_up=tile, down=down)
            seconds_of[tile] = measure(row)
        best = min(seconds_of, key=seconds_of.__getitem__)
        for tile in downs_for(best):
            row = TableRow(rows_per_expert=bound, regime=regime, gate_up=best, down=tile)
            found.append((measure(row), row))
    seconds, fastest = min(found, key=lambda pair: pair[0])
    return fastest, seconds


_Pairs = tuple[Iterable[TileConfig], Callable[[TileConfig], list[TileConfig]]]


def _sorted_pairs(profile: DeviceProfile, rows_per_expert: float, element_size: int) -> _Pairs:
    """Tiles of gate-up, and those of down that go with one of them: rows are sorted once, so M is the same."""
    persistent = rows_per_expert > _DECODE_BOUND
    gate_ups = list(sorted_tiles(profile, rows_per_expert, element_size, 2, persistent=persistent))
    downs = list(sorted_tiles(profile, rows_per_expert, element_size, 1, persistent=persistent))
    return gate_ups, lambda tile: [down for down in downs if down.block_m == tile.block_m]


def _tiny_pairs(profile: DeviceProfile, rows_per_expert: float, element_size: int) -> _Pairs:
    downs = list(tiny_tiles(profile, element_size, 1))
    return list(tiny_tiles(profile, element_size, 2)), lambda tile: downs


def _plainest(tiles: Sequence[TileConfig]) -> TileConfig:
    """One in the middle, to measure the other product with."""
    return tiles[len(tiles) // 2]


def _table(results: Sequence[dict[str, Any]]) -> TextTable:
    columns = ("weights, rows an expert", "regime", "gate_up", "down", "us", "present us", "written")
    rows = tuple(
        (
            f"{r['weights']}, up to {r['rows_per_expert'] or 'any'}",
            r["regime"],
            str(TileConfig(**r["gate_up"])),
            str(TileConfig(**r["down"])),
            *("-" if time is None else f"{time:,.1f}" for time in (r["us"], r["present_us"])),
            "yes" if r["written"] else "no",
        )
        for r in results
    )
    return TextTable(title="Tiles as M x N x K", columns=columns, rows=rows)
