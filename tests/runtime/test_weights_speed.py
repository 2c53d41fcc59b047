"""How fast weights are read: bytes of large tensors by the seconds that they took."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_runtime.weights import speed
from moe_runtime.weights.speed import read_speed
from tests.kernels.implementations import NATIVE

MB = 1 << 20


def test_bytes_of_large_tensors_by_the_seconds_until_enough_have_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, sizes = 0.0, []

    def read(address: int, num_bytes: int, num_streams: int, prefetch: int, num_threads: int) -> int:
        nonlocal now
        sizes.append(num_bytes)
        now += num_bytes / (2 * MB)
        return 0

    monkeypatch.setattr(speed, "native_function", lambda *_: read)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now))
    weights = [torch.zeros(size, dtype=torch.uint8) for size in (MB, 5, 3 * MB)]
    assert read_speed(weights, "any", seconds=4.2) == 2 * MB
    assert sizes == [MB, 3 * MB, MB, 3 * MB, MB]  # 4 MB of it in the first 2 s
    assert read_speed(weights[1:2], "any", seconds=1.0) is None


@pytest.mark.parametrize("implementation", NATIVE)
def test_the_compiled_function_reads_at_a_speed_that_some_memory_has(implementation: str) -> None:
    isa = implementation.removeprefix("cpu:")
    weights = [torch.ones(4 * MB, dtype=torch.bfloat16), torch.ones(2 * MB, dtype=torch.int8)]
    found = read_speed(weights, isa, seconds=0.02)
    assert found is not None
    assert 1e8 < found < 1e13
