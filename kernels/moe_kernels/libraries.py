"""Which optional libraries this process can use: a fact about the installation that `select` is told."""

from __future__ import annotations

import importlib.util
import logging

from moe_kernels.native.build import NativeBuildError

logger = logging.getLogger(__name__)


def available_libraries(device_kind: str, *, warn: bool = True) -> frozenset[str]:
    """Of "native" (on CPUs), "fla" and "flashinfer" (on GPUs), those that are there.

    Compiles the native library if nobody has; where it cannot be had, a warning says why unless `warn` is
    false. Imports no GPU library: fla-core asks the GPU for its properties as soon as it is imported.
    """
    if device_kind == "cpu":
        return _native(warn)
    return frozenset(name for name in ("fla", "flashinfer") if importlib.util.find_spec(name) is not None)


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
