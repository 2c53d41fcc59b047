"""What the CPU kernels' library is compiled from. Imports the standard library alone, as an installation needs it."""

from __future__ import annotations

import platform
from pathlib import Path

from moe_kernels.native.build import Unit

_FOLDER = Path(__file__).parent
# Instruction set, worst first -> what its copy of each source file may use, and what a CPU must have to run it, as
# Linux and the compilers name it. Every exported function ends in the name of its copy's set: moe_linear_avx2.
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
_AVX512_BF16 = (*_AVX512, "avx512_bf16", "avx512_vnni")
LEVELS = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": _AVX512_BF16,
    "amx": (*_AVX512_BF16, "amx_tile", "amx_bf16"),
}
# Exceptions would bring in functions that the copies share (see level.h); GCC's own headers of AVX-512 intrinsics
# use variables before they are set, on purpose.
_FLAGS = (
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)


def cpu_kernels() -> list[Unit]:
    """Every source file once for each instruction set."""
    return [
        Unit(source, (f"-DMOE_LEVEL={level}", *_FLAGS, *level_flags(level)))
        for source in sorted(_FOLDER.glob("*.cpp"))
        for level in LEVELS
    ]


def level_flags(level: str) -> tuple[str, ...]:
    """What the compiler is told of one of LEVELS: its features, which GCC and Clang spell in their own way."""
    return tuple(f"-m{feature.replace('avx512_', 'avx512').replace('_', '-')}" for feature in LEVELS[level])


def is_supported() -> bool:
    """Whether there are kernels for this machine's processors."""
    return platform.machine() in ("x86_64", "AMD64")
