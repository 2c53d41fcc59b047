"""The C library of the shared-memory link, as ctypes sees it."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from moe_kernels.native.build import NativeBuildError, Unit, compiled

_SOURCE = Path(__file__).parent / "native" / "host_link.c"

# The C enumerations of the same names.
MAX_RANKS = 64
MAX_VALUES = 32
DONE, ENDED, PEER_LEFT, BAD_EXPERT = range(4)
FLOAT32, BFLOAT16, FLOAT16 = range(3)


class Buffers(ctypes.Structure):
    """Where tokens and partial sums lie in this process, and their sizes; C's `buffers`."""

    _fields_ = [
        ("x", c_void_p),
        ("weights", c_void_p),
        ("parts", c_void_p),
        ("ids", c_void_p),
        ("local_of_expert", c_void_p),
        ("rank_of_expert", c_void_p),
        ("hidden", c_int64),
        ("top_k", c_int64),
        ("num_experts", c_int64),
        ("chunk_tokens", c_int64),
    ]


class Step(ctypes.Structure):
    """How many tokens each rank has in a step, and where they lie; C's `step`."""

    _fields_ = [
        ("counts", c_int64 * MAX_RANKS),
        ("firsts", c_int64 * MAX_RANKS),
        ("rows", c_int64),
        ("most", c_int64),
    ]


class Exchange(ctypes.Structure):
    """What dispatch and combine of one step are given; C's `exchange`."""

    _fields_ = [("link", c_void_p), ("buffers", c_void_p), ("step", c_void_p)]


# Told the nanoseconds that a wait has lasted; returns whether to end it.
WaitCallback = ctypes.CFUNCTYPE(c_int32, c_int64)

_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "moe_control_bytes": ([], c_int64),
    "moe_link_new": ([c_void_p, c_int32, c_int32, c_int64, c_int64, WaitCallback], c_void_p),
    "moe_link_free": ([c_void_p], None),
    "moe_waited_ns": ([c_void_p], c_void_p),
    "moe_sent_bytes": ([c_void_p], c_void_p),
    "moe_leave": ([c_void_p], None),
    "moe_is_behind": ([c_void_p, c_int32], c_int),
    "moe_who_left": ([c_void_p], c_int),
    "moe_agree": ([c_void_p, c_void_p, c_int32, c_void_p], c_int),
    "moe_dispatch": ([c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p], c_int),
    "moe_combine": ([c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_void_p, c_void_p], c_int),
    "moe_sum_rows": ([c_void_p, c_void_p, c_int32, c_int64, c_int32], None),
}


@functools.cache
def host_library() -> ctypes.CDLL:
    """The library, compiled on first use. Its calls let other Python threads run.

    Raises:
        NativeBuildError: it cannot be compiled or loaded on this machine.
    """
    try:
        library = ctypes.CDLL(str(compiled("host_link", [Unit(_SOURCE)])))
    except OSError as error:
        raise NativeBuildError(f"the compiled library cannot be loaded: {error}") from error
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def address_of(function: Any) -> int:
    """Where a function of the library lies, for other native code to call."""
    address = ctypes.cast(function, c_void_p).value
    assert address is not None, "a function of a loaded library"
    return address
