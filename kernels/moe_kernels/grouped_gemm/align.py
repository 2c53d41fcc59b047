"""Sorting choices by expert on the device: where each expert's rows lie, and which tile computes what.

Shape legend: M = G * K choices, L local experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moe_kernels.grouped_gemm.launch import ONE_PROGRAM_CHOICES

BLOCK = 1024
WARPS = 8  # of the one program


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """Rows sorted by expert. All of it is on the device; what lies past the counts is not initialised."""

    choices_M: torch.Tensor  # int32: row -> its choice, g * K + k
    offsets_L: torch.Tensor  # int32 [L + 2]: expert -> its first row; then the number of rows, and of tiles
    tiles: torch.Tensor  # int32 [2, max_tiles]: a tile's expert, and its first row
    max_tiles: int  # a bound that the host knows


def max_tiles(num_choices: int, num_local: int, block_m: int) -> int:
    """The most tiles of `block_m` rows that so many choices can make."""
    hit = min(num_choices, num_local)
    return hit + (num_choices - hit) // block_m


def align(local_ids_GK: torch.Tensor, num_local: int, block_m: int) -> Alignment:
    """Rows of a tile belong to one expert. Within an expert they stand in no particular order."""
    num_choices = local_ids_GK.numel()
    bound = max_tiles(num_choices, num_local, block_m)

    def indices(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=local_ids_GK.device)

    choices, offsets, tiles = indices(num_choices), indices(num_local + 2), indices(2, bound)
    cursors = indices(num_local)
    bins = num_bins(num_local)
    sizes = {"L": num_local, "BINS": bins, "BLOCK_M": block_m, "BLOCK": BLOCK, "num_warps": WARPS}
    if num_choices <= ONE_PROGRAM_CHOICES:
        align_one[(1,)](local_ids_GK, cursors, choices, offsets, tiles, num_choices, bound, **sizes)
    else:
        cursors.zero_()
        grid = (triton.cdiv(num_choices, BLOCK),)
        count[grid](local_ids_GK, cursors, num_choices, L=num_local, BINS=bins, BLOCK=BLOCK)
        lay_out[(1,)](cursors, offsets, tiles, bound, L=num_local, BINS=bins, BLOCK_M=block_m)
        scatter[grid](local_ids_GK, cursors, choices, num_choices, BLOCK=BLOCK)
    return Alignment(choices_M=choices, offsets_L=offsets, tiles=tiles, max_tiles=bound)


def num_bins(num_local: int) -> int:
    """Bins of a histogram of so many experts: a power of two, of which there are two at least."""
    return max(triton.next_power_of_2(num_local), 2)


@triton.jit
def _histogram(ids, start, num_choices, BINS: tl.constexpr, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK)
    expert = tl.load(ids + at, mask=at < num_choices, other=-1).to(tl.int32)
    return tl.histogram(tl.maximum(expert, 0), BINS, mask=expert >= 0)


@triton.jit
def _lay_out(
    counts_L, cursors, offsets, tiles, bound, L: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr
):
    expert = tl.arange(0, BINS)
    rows = tl.cumsum(counts_L, 0) - counts_L
    num_tiles = (counts_L + BLOCK_M - 1) // BLOCK_M
    first = tl.cumsum(num_tiles, 0) - num_tiles
    tl.store(cursors + expert, rows, mask=expert < L)
    tl.store(offsets + expert, rows, mask=expert < L)
    tl.store(offsets + L, tl.sum(counts_L, 0))
    tl.store(offsets + L + 1, tl.sum(num_tiles, 0))
    for i in range(tl.max(num_tiles, 0)):
        tl.store(tiles + first + i, expert, mask=i < num_tiles)
        tl.store(tiles + bound + first + i, rows + i * BLOCK_M, mask=i < num_tiles)


@triton.jit
def _scatter(ids, cursors, choices, start, num_choices, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK)
    expert = tl.load(ids + at, mask=at < num_choices, other=-1).to(tl.int32)
    row = tl.atomic_add(cursors + tl.maximum(expert, 0), 1, mask=expert >= 0)
    tl.store(choices + row, at, mask=expert >= 0)


@triton.jit(do_not_specialize=["num_choices", "bound"])
def align_one(
    ids,
    cursors,
    choices,
    offsets,
    tiles,
    num_choices,
    bound,
    L: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All three steps, in one program."""
    counts_L = tl.zeros([BINS], tl.int32)
    for start in range(0, num_choices, BLOCK):
        counts_L += _histogram(ids, start, num_choices, BINS, BLOCK)
    _lay_out(counts_L, cursors, offsets, tiles, bound, L, BINS, BLOCK_M)
    tl.debug_barrier()  # the cursors are read back by other threads
    for start in range(0, num_choices, BLOCK):
        _scatter(ids, cursors, choices, start, num_choices, BLOCK)


@triton.jit(do_not_specialize=["num_choices"])
def count(ids, counts, num_choices, L: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the experts' numbers of choices to `counts` (zero at first)."""
    expert = tl.arange(0, BINS)
    found = _histogram(ids, tl.program_id(0) * BLOCK, num_choices, BINS, BLOCK)
    tl.atomic_add(counts + expert, found, mask=(expert < L) & (found > 0))


@triton.jit(do_not_specialize=["bound"])
def lay_out(cursors, offsets, tiles, bound, L: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Turns counts into offsets and tiles; `cursors` comes with the counts and leaves with first rows."""
    expert = tl.arange(0, BINS)
    counts_L = tl.load(cursors + expert, mask=expert < L, other=0)
    _lay_out(counts_L, cursors, offsets, tiles, bound, L, BINS, BLOCK_M)


@triton.jit(do_not_specialize=["num_choices"])
def scatter(ids, cursors, choices, num_choices, BLOCK: tl.constexpr):
    """Gives each choice its row."""
    _scatter(ids, cursors, choices, tl.program_id(0) * BLOCK, num_choices, BLOCK)
