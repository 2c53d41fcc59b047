"""How fast a rank reads its weights: what bounds decodes, and on shared machines not the same from minute to minute."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from moe_kernels.native.library import native_function

_SMALLEST = 1 << 20  # bytes; smaller tensors take longer to call for than to read
# The pattern of reading that was fastest, or as fast as any, where it was tried (`bench kernels` tries several).
_STREAMS, _PREFETCH_BYTES = 4, 512


def read_speed(weights: Iterable[torch.Tensor], isa: str, seconds: float) -> float | None:
    """Bytes a second at which torch's number of threads reads CPU tensors one after another, over and over.

    Small tensors are left out; None: there are no others.

    Args:
        isa: instruction set, one of `moe_kernels.native.units.LEVELS`.
        seconds: it takes at least; the tensor that is being read is read to its end.
    """
    large = [tensor for tensor in weights if tensor.nbytes >= _SMALLEST]
    if not large:
        return None
    read = native_function("moe_read_stream", isa)
    num_threads, num_bytes = torch.get_num_threads(), 0
    began = time.perf_counter()
    while True:
        for tensor in large:
            read(tensor.data_ptr(), tensor.nbytes, _STREAMS, _PREFETCH_BYTES, num_threads)
            num_bytes += tensor.nbytes
            taken = time.perf_counter() - began
            if taken >= seconds:
                return num_bytes / taken
