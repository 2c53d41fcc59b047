"""StaticLaunch: one launch of a Triton kernel, as a value, so that it can be compiled with no GPU there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class TensorArgument:
    """A pointer to elements of this type."""

    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class DescriptorArgument:
    """A tensor descriptor made on the host."""

    dtype: torch.dtype
    block_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticLaunch:
    """A kernel with all that decides what it is compiled to."""

    name: str  # of the operation and its part: "grouped_gemm.gate_up decode"
    kernel: Any  # the triton.jit function
    # Parameter name -> TensorArgument, DescriptorArgument, a run-time number as it typically is (of an integer, whether
    # 16 divides it is compiled in), or `int` for one that the kernel does not specialise on.
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]  # tl.constexpr parameters
    num_warps: int
    num_stages: int
    tile: str  # for people: "64x128x64"
    bytes_per_stage: int  # that one stage of the main loop's pipeline brings in, for one program; 0: no loop
    mma: bool  # whether the kernel must use tensor cores
    # Whether the tile is too small for wgmma (sm_90) and tcgen05 (sm_100), on purpose: then it is mma.sync there, too.
    small_mma: bool = False
    # Where few rows may leave multiprocessors idle: programs that have work with the fewest rows that the launch is
    # for, and bytes of weights that the main loop of one reads in all. 0: there are always enough.
    num_programs: int = 0
    loop_bytes: int = 0
    # Of a persistent kernel: programs that it is launched with for each multiprocessor; 0: it is none.
    persistent_programs: int = 0
    # For a kernel without a pipelined loop: what one program asks of memory before it uses any of it; 0: not said.
    bytes_at_once: int = 0
