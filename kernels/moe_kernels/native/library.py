"""The CPU kernels' shared library, as ctypes sees it."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from moe_kernels.device import may_use_amx
from moe_kernels.native.build import NativeBuildError, compiled
from moe_kernels.native.signatures import SIGNATURES
from moe_kernels.native.units import LEVELS, cpu_kernels, is_supported


@functools.cache
def native_library() -> ctypes.CDLL:
    """The library, compiled on first use. Its calls let other Python threads run.

    Raises:
        NativeBuildError: it cannot be compiled or loaded on this machine.
    """
    if not is_supported():
        raise NativeBuildError(f"the compiled kernels are for x86-64, this machine is {platform.machine()}")
    path = compiled("cpu_kernels", cpu_kernels())
    try:
        _share_openmp()
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeBuildError(f"the compiled library cannot be loaded: {error}") from error
    for name, (arguments, result) in SIGNATURES.items():
        for level in LEVELS:
            function = getattr(library, f"{name}_{level}")
            function.argtypes, function.restype = arguments, result
    return library


@functools.cache
def native_function(name: str, isa: str) -> Callable[..., int]:
    """The function `name` of SIGNATURES in its copy for the instruction set `isa`.

    Raises:
        NativeBuildError: as `native_library`.
        ValueError: the library is not compiled for `isa`, or this process may not use it.
    """
    if isa not in LEVELS:
        raise ValueError(f"instruction set is {isa!r}; the library is compiled for {sorted(LEVELS)}")
    if isa == "amx" and not may_use_amx():
        raise ValueError("instruction set is 'amx', which this system does not let processes use")
    return getattr(native_library(), f"{name}_{isa}")


def _share_openmp() -> None:
    """Let the library, which names no OpenMP library itself, find torch's: two would keep two pools of threads."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    ctypes.CDLL(str(bundled[0]) if bundled else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
