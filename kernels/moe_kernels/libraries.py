"""Which optional libraries this process can use: a fact about the installation that `select` is told."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path

from moe_kernels.native.build import NativeBuildError

logger = logging.getLogger(__name__)

_DEFAULT_CUDA_HOME = "/usr/local/cuda"  # where FlashInfer looks last


def available_libraries(device_kind: str, *, warn: bool = True) -> frozenset[str]:
    """Of "native" (on CPUs), "fla" and "flashinfer" (on GPUs), those that are there.

    Compiles the native library if nobody has; where it cannot be had, a warning says why unless `warn` is
    false. Imports no GPU library: fla-core asks the GPU for its properties as soon as it is imported.
    """
    if device_kind == "cpu":
        return _native(warn)
    found = {name for name in ("fla", "flashinfer") if importlib.util.find_spec(name) is not None}
    if "flashinfer" in found and not _flashinfer_has_kernels():
        found.remove("flashinfer")
        if warn:
            logger.warning(
                "flashinfer is installed, but its kernels are not: it needs a CUDA toolkit (nvcc, on the path or in "
                "CUDA_HOME) to compile them, or the package flashinfer-jit-cache; Triton's attention is taken"
            )
    return frozenset(found)


def _flashinfer_has_kernels() -> bool:
    """Whether it comes with them, or can compile them; it looks for the compiler in these places."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _DEFAULT_CUDA_HOME)
    return (
        importlib.util.find_spec("flashinfer_jit_cache") is not None
        or shutil.which("nvcc") is not None
        or any(Path(home, "bin", "nvcc").exists() for home in homes if home)
    )


def _native(warn: bool) -> frozenset[str]:
    from moe_kernels.native.library import native_library

    try:
        native_library()
    except NativeBuildError as error:
        if warn:
            logger.warning(
                "no compiled CPU kernels: %s; plain torch computes on this node, much slower", error
            )
        return frozenset()
    return frozenset({"native"})
