"""Launch parameters of the Gated DeltaNet kernels."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaLaunch:
    """Blocks, warps and pipeline stages; the fields are small positive integers."""

    decode_block_v: int = 32  # columns of the state a program: 128 bytes of each of its rows
    decode_warps: int = 4
    prepare_block: int = 64  # columns of q, k and v at a time
    prepare_warps: int = 4
    prepare_stages: int = 2
    scan_block_v: int = 32  # the smaller, the more programs share a short batch's sequential pass
    scan_warps: int = 4
    scan_stages: int = 2

    def to_list(self) -> list[int]:
        """As an operator's argument."""
        return list(astuple(self))

    @classmethod
    def from_list(cls, values: list[int]) -> GatedDeltaLaunch:
        """The launch that `to_list` made."""
        return cls(**dict(zip((field.name for field in fields(cls)), values, strict=True)))


def default_launch(dtype: torch.dtype) -> GatedDeltaLaunch:
    """The launch for inputs of this type, on every GPU from sm_80: its kernels keep their values in registers there.

    Products in full float32 have no tensor cores and need smaller blocks; the scan still spills.
    """
    if dtype == torch.float32:
        return GatedDeltaLaunch(
            prepare_block=16, prepare_warps=8, scan_block_v=16, scan_warps=8, scan_stages=1
        )
    return GatedDeltaLaunch()
