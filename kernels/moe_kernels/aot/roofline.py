"""The least time that a GPU needs for so many operations and bytes, by its datasheet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # for a type only: whoever reads data sheets may do without it


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """What the vendor says a GPU can do at best."""

    name: str
    source: str
    bytes_per_s: float  # of its memory
    bf16_flops: float  # dense, a second, summed in float32
    fp8_flops: float | None  # the same; None: the GPU has no such instruction


@dataclass(frozen=True, slots=True)
class Work:
    """What a kernel has to do at least."""

    flops: float  # a multiplication and an addition are two
    num_bytes: float  # read and written once

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)


# By name: `moe_runtime.simulate` takes them from here too.
H100_SXM = Peak(
    name="H100 SXM",
    source="NVIDIA H100 datasheet (half of its figures, which are for sparse matrices)",
    bytes_per_s=3.35e12,
    bf16_flops=989.5e12,
    fp8_flops=1979e12,
)
H200 = Peak(
    name="H200",
    source="NVIDIA H200 datasheet (half of its figures, which are for sparse matrices)",
    bytes_per_s=4.8e12,
    bf16_flops=989.5e12,
    fp8_flops=1979e12,
)
B200 = Peak(
    name="B200",
    source="NVIDIA HGX B200 datasheet (half of its figures, which are for sparse matrices)",
    bytes_per_s=8e12,
    bf16_flops=2250e12,
    fp8_flops=4500e12,
)

# The GPU of each architecture that serves such models most.
PEAKS = {
    (8, 0): Peak(
        name="A100 SXM 80GB",
        source="NVIDIA A100 datasheet",
        bytes_per_s=2.039e12,
        bf16_flops=312e12,
        fp8_flops=None,
    ),
    (8, 9): Peak(
        name="L40S",
        source="NVIDIA L40S datasheet",
        bytes_per_s=0.864e12,
        bf16_flops=362.05e12,
        fp8_flops=733e12,
    ),
    (9, 0): H100_SXM,
    (10, 0): B200,
    (12, 0): Peak(
        name="RTX 5090",
        source="NVIDIA RTX Blackwell GPU architecture whitepaper",
        bytes_per_s=1.792e12,
        bf16_flops=209.5e12,
        fp8_flops=419e12,
    ),
}
# GPUs that share an architecture with the one above, by a part of their name.
_BY_NAME = {
    "H200": H200,
    "A100-SXM4-40GB": Peak(
        name="A100 40GB",
        source="NVIDIA A100 datasheet",
        bytes_per_s=1.555e12,
        bf16_flops=312e12,
        fp8_flops=None,
    ),
}


def peak_of(name: str, capability: tuple[int, int] | None) -> Peak | None:
    """The peak of a GPU of this name and compute capability; None where it is not known."""
    for part, peak in _BY_NAME.items():
        if part in name:
            return peak
    return PEAKS.get(capability) if capability else None


def roofline_seconds(work: Work, peak: Peak, dtype: torch.dtype) -> float:
    """The longer of moving the bytes and of multiplying numbers of `dtype`, as if nothing else cost time.

    Float8 on a GPU without float8 instructions is multiplied as bfloat16.
    """
    is_fp8 = dtype.is_floating_point and dtype.itemsize == 1
    flops = peak.fp8_flops if is_fp8 and peak.fp8_flops else peak.bf16_flops
    return max(work.num_bytes / peak.bytes_per_s, work.flops / flops)
