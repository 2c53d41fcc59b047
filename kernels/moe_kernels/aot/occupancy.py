"""How many programs of a kernel run at once on one multiprocessor.

Limits from the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; granularities of
allocation as NVIDIA's occupancy calculator has them.
"""

from __future__ import annotations

from dataclasses import dataclass

RESERVED_SHARED = 1024  # bytes of each block that the system keeps
_REGISTERS = 65536  # of a multiprocessor
_SUB_PARTITIONS = 4
_REGISTER_UNIT = 256  # registers are handed to warps in such pieces
_SHARED_UNIT = 128  # bytes


@dataclass(frozen=True, slots=True)
class Multiprocessor:
    """Limits of one multiprocessor; shared memory in bytes."""

    max_warps: int
    max_blocks: int
    shared_memory: int
    shared_memory_per_block: int  # that a kernel may opt in to
    count: int  # of them on a GPU, typically: A100, RTX 4090, H100, B200, RTX 5090


MULTIPROCESSORS = {
    (8, 0): Multiprocessor(64, 32, 167936, 166912, 108),
    (8, 9): Multiprocessor(48, 24, 102400, 101376, 128),
    (9, 0): Multiprocessor(64, 32, 233472, 232448, 132),
    (10, 0): Multiprocessor(64, 32, 233472, 232448, 148),
    (12, 0): Multiprocessor(48, 24, 102400, 101376, 170),
}


def blocks_per_multiprocessor(
    capability: tuple[int, int], registers: int, shared_memory: int, num_warps: int
) -> int:
    """Programs that fit together: `registers` a thread, `shared_memory` bytes and `num_warps` a program."""
    limits = MULTIPROCESSORS[capability]
    registers_per_warp = _round_up(registers * 32, _REGISTER_UNIT)
    warps = _REGISTERS // _SUB_PARTITIONS // registers_per_warp * _SUB_PARTITIONS
    shared = _round_up(shared_memory + RESERVED_SHARED, _SHARED_UNIT)
    return min(
        warps // num_warps,
        limits.max_warps // num_warps,
        limits.max_blocks,
        limits.shared_memory // shared,
    )


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
