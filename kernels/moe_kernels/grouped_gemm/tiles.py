"""TileConfig: one grouped kernel's tile and pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_kernels.aot.occupancy import MULTIPROCESSORS, RESERVED_SHARED
from moe_kernels.device import DeviceProfile

# Bytes a block may have, of the GPUs that have these kernels.
_SMALLEST_SHARED_MEMORY = min(limits.shared_memory_per_block for limits in MULTIPROCESSORS.values())
_SLACK = 4096  # bytes of shared memory that a kernel may need beside its pipeline
_BESIDE = 1024  # bytes of the same that kernels were seen to need: barriers, and scales

FEWEST_MULTIPROCESSORS = 46  # of the same GPUs

TINY, DECODE, PREFILL = range(3)
REGIMES = ("tiny", "decode", "prefill")


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """What a program computes at once, and how much of its weights is under way meanwhile."""

    block_m: int  # rows of one expert; tiny takes them one by one
    block_n: int
    block_k: int  # with float8: 128 or a divisor of it; tiny also takes multiples
    num_warps: int
    num_stages: int
    swap: bool = False  # weights on the left of the product
    tma: bool = False  # weights through tensor descriptors, on sm_90 and later
    warp_specialize: bool = False  # warps of their own for the weights, on sm_100, with `tma`
    programs: int = 1  # that a multiprocessor gets at once, of a persistent kernel (prefill)

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> TileConfig:
        """From the values of the fields in their order."""
        block_m, block_n, block_k, num_warps, num_stages, swap, tma, specialize, programs = values
        return cls(
            block_m=block_m,
            block_n=block_n,
            block_k=block_k,
            num_warps=num_warps,
            num_stages=num_stages,
            swap=bool(swap),
            tma=bool(tma),
            warp_specialize=bool(specialize),
            programs=programs,
        )

    def shared_memory(self, element_size: int, weight_tiles: int, *, wide_mma: bool = True) -> int:
        """Bytes that the pipeline of one program needs, roughly: a stage holds activations and weights.

        Without wgmma or tcgen05 (`wide_mma`) the last stage is multiplied from registers and has no place of its own.
        """
        rows = self.block_m + weight_tiles * self.block_n
        stages = self.num_stages if wide_mma else max(self.num_stages - 1, 1)
        return rows * self.block_k * element_size * stages

    def fitted(self, depth: int, element_size: int, weight_tiles: int, profile: DeviceProfile) -> TileConfig:
        """As such a GPU can launch it, for weights' rows of `depth` elements.

        With fewer stages, and then a shorter k, where the pipeline would need more shared memory than a program may
        have; with fewer programs at once where it would need more than a multiprocessor has; without a descriptor where
        the rows are not of a multiple of 16 bytes; and without specialised warps where Triton has none.
        """
        limit = _shared_memory_of(profile)
        # Of other makers' GPUs nobody has looked how many stages they keep.
        wide_mma = profile.compute_capability is None or profile.compute_capability[0] in (9, 10)
        tile = replace(self, tma=False) if depth * element_size % 16 else self
        if not tile.tma or (profile.compute_capability or (0, 0))[0] != 10:
            tile = replace(tile, warp_specialize=False)
        while (needed := tile.shared_memory(element_size, weight_tiles, wide_mma=wide_mma) + _SLACK) > limit:
            if tile.num_stages > 2:
                tile = replace(tile, num_stages=tile.num_stages - 1)
            else:
                tile = replace(tile, block_k=tile.block_k // 2)
        # A multiprocessor has what one program may have and what the system keeps of one.
        at_once = (limit + RESERVED_SHARED) // (needed - _SLACK + _BESIDE + RESERVED_SHARED)
        return replace(tile, programs=max(1, min(tile.programs, at_once)))

    def __str__(self) -> str:
        flags = {"swapped": self.swap, "tma": self.tma, "specialised": self.warp_specialize}
        size = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return " ".join([size, *(name for name, has in flags.items() if has)])


def _shared_memory_of(profile: DeviceProfile) -> int:
    """Bytes that one program may have."""
    return profile.shared_memory_per_block_optin or _SMALLEST_SHARED_MEMORY
