"""What this machine can do at best: one thread and all of them reading memory, one multiplying float32 matrices."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch

from moe_kernels.huge_pages import advise_huge_pages
from moe_kernels.native.library import native_function
from moe_runtime.bench.kernels.cases import turns_past_cache
from moe_runtime.bench.kernels.timing import interleaved_medians
from moe_runtime.bench.machine import CPUS, LAST_LEVEL, last_level_cache

_DEFAULT_CACHE = 32 << 20  # where the system does not say
_READ_BYTES = 64 << 20  # of one call
# (runs side by side, bytes fetched ahead): which is fastest depends on the CPU.
_READ_PATTERNS = ((1, 0), (4, 0), (4, 512), (8, 1024))
_MATRIX = 1024


@functools.cache
def cache_bytes() -> int:
    """Bytes of the last-level cache that a core can use."""
    text = last_level_cache() or ""
    return int(text.removesuffix("K")) << 10 if text.endswith("K") else _DEFAULT_CACHE


def num_caches() -> int:
    """Last-level caches of the cores that this process may use; 1 where the system does not say."""
    sharers = (CPUS / f"cpu{cpu}" / LAST_LEVEL / "shared_cpu_list" for cpu in os.sched_getaffinity(0))
    return len({file.read_text() for file in sharers if file.exists()}) or 1


def read_calls(isa: str, num_threads: int = 1) -> tuple[dict[str, Callable[[], object]], int]:
    """Ways for so many threads to read memory together, each a call that reads so many bytes that are in no cache."""
    # Threads are woken for each call: many of them need more to read than one does, for that not to count.
    num_bytes = max(_READ_BYTES, num_threads * _READ_BYTES // 8)
    caches = num_caches() if num_threads > 1 else 1
    memory = torch.empty(
        turns_past_cache(num_bytes, caches * cache_bytes()), num_bytes // 8, dtype=torch.int64
    )
    advise_huge_pages([memory])
    # Piece by piece, by torch's threads, so that of two sockets each has a part of every piece in its memory.
    for piece in memory:
        piece.fill_(1)
    read = native_function("moe_read_stream", isa)

    def reader(num_streams: int, prefetch: int) -> Callable[[], object]:
        turn = 0

        def call() -> int:
            nonlocal turn
            turn = (turn + 1) % memory.shape[0]
            return read(memory[turn].data_ptr(), num_bytes, num_streams, prefetch, num_threads)

        return call

    return {f"read {n} {ahead}": reader(n, ahead) for n, ahead in _READ_PATTERNS}, num_bytes


def read_bytes_per_s_of_all(isa: str, num_rounds: int) -> tuple[float, int]:
    """Bytes a second that a thread on each core of this process reads, summed, by the wall clock; number of threads."""
    num_threads = len(os.sched_getaffinity(0))
    calls, num_bytes = read_calls(isa, num_threads)
    timings = interleaved_medians(calls, num_rounds, clock=time.perf_counter)
    return num_bytes / min(timing.seconds for timing in timings.values()), num_threads


def sgemm_call() -> tuple[Callable[[], object], float]:
    """A float32 product in torch, and its floating-point operations."""
    a, b, out = (torch.rand(_MATRIX, _MATRIX) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2.0 * _MATRIX**3
