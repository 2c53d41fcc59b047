"""Launch parameters of the attention kernels."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace

import torch

from moe_kernels.sequences import PREFILL_CHUNK

_MIN_SPLIT = 128  # tokens: fewer are read faster than another program starts
_MAX_WASTE = 8  # programs with nothing to do, and their scratch, for each one wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLaunch:
    """Blocks, warps and pipeline stages; the fields are small positive integers."""

    decode_programs: int = 216  # that keep the device busy
    decode_tokens: int = 32  # keys at a time
    decode_warps: int = 4
    decode_stages: int = 2
    prefill_rows: int = 64  # queries of a program, counted over heads
    prefill_tokens: int = 16
    prefill_warps: int = 4
    prefill_stages: int = 2

    def to_list(self) -> list[int]:
        """As an operator's argument."""
        return list(astuple(self))

    @classmethod
    def from_list(cls, values: list[int]) -> AttentionLaunch:
        """The launch that `to_list` made."""
        return cls(**dict(zip((field.name for field in fields(cls)), values, strict=True)))

    def splits(self, num_rows: int, longest: int, total: int) -> tuple[int, int]:
        """(tokens of a split, splits of the longest row) for decodes.

        A row is a sequence's key head: `num_rows` of them attend to `total` tokens, one to `longest`. Splits are
        of one size, so that a long sequence beside short ones has more of them.
        """
        even = -(-total // self.decode_programs)
        most = max(1, _MAX_WASTE * self.decode_programs // num_rows)
        tokens = max(even, -(-longest // most), 1)
        tokens = -(-tokens // _MIN_SPLIT) * _MIN_SPLIT
        return tokens, -(-longest // tokens)

    def decode_blocks(self, group: int) -> dict[str, int]:
        """The constants of the decode for `group` query heads of a key head."""
        return {"BLOCK_R": _rows(group), "BLOCK_S": self.decode_tokens}

    def prefill_blocks(self, group: int) -> dict[str, int]:
        """The constants of the prefill for `group` query heads of a key head."""
        most = max(1, self.prefill_rows // group)
        tokens = -(-PREFILL_CHUNK // -(-PREFILL_CHUNK // most))  # a tile's, in as many parts but even ones
        rows = _rows(tokens * group)
        return {"TILE": PREFILL_CHUNK, "TOKENS": tokens, "BLOCK_R": rows, "BLOCK_S": self.prefill_tokens}


def _rows(count: int) -> int:
    """The least number of rows that is not below `count` and that a product takes."""
    return max(16, 1 << (count - 1).bit_length())


def default_launch(dtype: torch.dtype) -> AttentionLaunch:
    """The launch for inputs of this type that every GPU can run; with heads above 256 values its prefill spills.

    Products in full float32 have no tensor cores and need smaller blocks.
    """
    if dtype == torch.float32:
        return AttentionLaunch(decode_tokens=16, decode_warps=8, prefill_rows=32, prefill_warps=8)
    return AttentionLaunch()


def launch_for(
    capability: tuple[int, int] | None,
    num_multiprocessors: int | None,
    dtype: torch.dtype,
    head_size: int,
) -> AttentionLaunch:
    """The launch for an NVIDIA GPU of this compute capability; the default for any other device.

    Its kernels keep the sums of heads of 256 values in registers (with wgmma and mma.sync 128 of each thread's
    255) and their blocks in the shared memory that a program can have.
    """
    launch = default_launch(dtype)
    if capability is None or num_multiprocessors is None:
        return launch
    # Two rounds, or two programs a multiprocessor, hide one that is late.
    launch = replace(launch, decode_programs=2 * num_multiprocessors)
    if dtype == torch.float32 or head_size > 256:
        return launch
    launch = replace(launch, decode_stages=3, prefill_stages=3)
    if capability[0] == 9:
        return replace(launch, prefill_rows=128, prefill_tokens=64, prefill_warps=8, prefill_stages=2)
    if capability[0] == 10:
        launch = replace(launch, prefill_rows=128, prefill_tokens=32, prefill_warps=8)
    # Smaller heads leave registers for more keys.
    return launch if head_size > 128 else replace(launch, prefill_tokens=2 * launch.prefill_tokens)
