"""Memory in huge pages: weights that are read from end to end at every step want few entries of page tables."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterable

import torch

_HUGE_PAGE = 2 << 20  # bytes, on x86-64 and most others


def advise_huge_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Ask the system to back these CPU tensors with huge pages where it can; to be called before they are filled.

    Advice only: nothing happens where the system has none, and a tensor keeps its address and its values.
    """
    advise = _madvise()
    if advise is None:
        return
    for tensor in tensors:
        start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        if tensor.device.type == "cpu" and end > start:
            advise(start, end - start, mmap.MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
