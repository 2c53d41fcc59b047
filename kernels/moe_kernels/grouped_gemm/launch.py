"""GroupedGemmLaunch: which kernels run for how many rows, and in what tiles; chosen without a GPU.

Shape legend: G rows after dispatch, L local experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace

import torch

from moe_kernels.device import DeviceProfile
from moe_kernels.grouped_gemm.rule import rows_by_rule
from moe_kernels.grouped_gemm.tables import TableKey, TableRow, load_rows
from moe_kernels.grouped_gemm.tiles import FEWEST_MULTIPROCESSORS, REGIMES, TileConfig
from moe_kernels.shapes import KernelShapes

# Choices that one program sorts by expert; the atomics of a longer list are better spread over the chip.
ONE_PROGRAM_CHOICES = 16 * 1024
_NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What runs for up to `max_rows` rows."""

    max_rows: int
    regime: int  # an index of REGIMES
    gate_up: TileConfig
    down: TileConfig

    def __str__(self) -> str:
        return f"{REGIMES[self.regime]} {self.gate_up}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedGemmLaunch:
    """Buckets by rising `max_rows`; the last has no bound."""

    buckets: tuple[Bucket, ...]
    native_fp8: bool = False  # whether the GPU multiplies float8_e4m3fn
    num_multiprocessors: int = FEWEST_MULTIPROCESSORS
    one_program_rows: int = _NO_LIMIT  # whose choices one program sorts; so many or more never come: no limit

    def bucket(self, num_rows: int) -> Bucket:
        """The first bucket that takes so many rows."""
        return next(bucket for bucket in self.buckets if num_rows <= bucket.max_rows)

    def fewest_rows(self, bucket: Bucket) -> int:
        """The least number of rows that `bucket` takes."""
        return 1 + max((b.max_rows for b in self.buckets if b.max_rows < bucket.max_rows), default=0)

    def variants(self) -> Iterator[Bucket]:
        """One bucket for each distinct set of compiled kernels."""
        seen = {(b.regime, b.gate_up, b.down): b for b in reversed(self.buckets)}
        return reversed(seen.values())

    def warm_up_rows(self) -> tuple[int, ...]:
        """Numbers of rows that between them run every variant that serving can reach: what start-up compiles."""
        rows = {1, *(bucket.max_rows + 1 for bucket in self.buckets[:-1])}
        if self.one_program_rows < _NO_LIMIT:
            rows.add(self.one_program_rows + 1)
        return tuple(sorted(rows))

    def to_ints(self, num_rows: int) -> list[int]:
        """The bucket for so many rows and all else that a launch needs, flat, for an operator's arguments."""
        bucket = self.bucket(num_rows)
        tiles = (*astuple(bucket.gate_up), *astuple(bucket.down))
        return [bucket.regime, int(self.native_fp8), self.num_multiprocessors, *map(int, tiles)]


def from_ints(values: Sequence[int]) -> tuple[int, bool, int, TileConfig, TileConfig]:
    """(regime, native_fp8, num_multiprocessors, gate-up tile, down tile): what `to_ints` flattened."""
    regime, native_fp8, num_multiprocessors, *tiles = values
    half = len(tiles) // 2
    gate_up, down = TileConfig.from_ints(tiles[:half]), TileConfig.from_ints(tiles[half:])
    return regime, bool(native_fp8), num_multiprocessors, gate_up, down


def choose(profile: DeviceProfile, shapes: KernelShapes, dtype: torch.dtype) -> tuple[GroupedGemmLaunch, str]:
    """The launch for a model whose expert weights are `dtype` on such a GPU, and one sentence of reason."""
    rows, source = load_rows(profile.architecture, TableKey.of(shapes, dtype)), "from its table"
    if not rows:
        rows, source = rows_by_rule(profile, shapes, dtype), "by rule"
    launch = launch_of_rows(rows, profile, shapes, dtype)
    return (
        launch,
        f"Triton kernels for {profile.architecture}, {source}: {', '.join(map(str, launch.variants()))}",
    )


def launch_of_rows(
    rows: Sequence[TableRow], profile: DeviceProfile, shapes: KernelShapes, dtype: torch.dtype
) -> GroupedGemmLaunch:
    """The launch with the tiles of `rows`, made to fit the GPU and the model's sizes."""
    return GroupedGemmLaunch(
        buckets=_reachable([_bucket(row, shapes, dtype, profile) for row in rows], shapes.max_tokens),
        native_fp8=(profile.compute_capability or (8, 0)) >= (8, 9),
        num_multiprocessors=profile.num_multiprocessors or FEWEST_MULTIPROCESSORS,
        one_program_rows=_one_program_rows(shapes),
    )


def default_launch(top_k: int, gate_up_L2FH: torch.Tensor) -> GroupedGemmLaunch:
    """For callers with no plan: what any GPU can run, taking the local experts for all there are."""
    num_local, rows, hidden = gate_up_L2FH.shape
    shapes = KernelShapes(
        hidden_size=hidden,
        num_experts=num_local,
        num_local_experts=num_local,
        top_k=top_k,
        moe_intermediate_size=rows // 2,
        max_tokens=0,
    )
    profile = DeviceProfile(kind="cuda", name="any", total_memory=0, compute_capability=(8, 0))
    return choose(profile, shapes, gate_up_L2FH.dtype)[0]


def _one_program_rows(shapes: KernelShapes) -> int:
    rows = ONE_PROGRAM_CHOICES // max(shapes.top_k, 1)
    return _NO_LIMIT if 0 < shapes.max_tokens <= rows else rows


def _reachable(buckets: Sequence[Bucket], max_rows: int) -> tuple[Bucket, ...]:
    """Without those for more rows than `max_rows` (0: not known); what is left has no bound at its end."""
    kept = [
        bucket
        for before, bucket in zip((0, *(b.max_rows for b in buckets)), buckets, strict=False)
        if bucket.max_rows > before and (not max_rows or before < max_rows)
    ]
    return (*kept[:-1], replace(kept[-1], max_rows=_NO_LIMIT))


def _bucket(row: TableRow, shapes: KernelShapes, dtype: torch.dtype, profile: DeviceProfile) -> Bucket:
    # Rows an expert -> rows in all: each row makes top_k choices among all experts of the model.
    bound = row.rows_per_expert
    return Bucket(
        max_rows=_NO_LIMIT if bound is None else int(bound / max(shapes.rows_per_expert(1), 1e-9) + 1e-6),
        regime=REGIMES.index(row.regime),
        gate_up=row.gate_up.fitted(shapes.hidden_size, dtype.itemsize, 2, profile),
        down=row.down.fitted(shapes.moe_intermediate_size, dtype.itemsize, 1, profile),
    )
