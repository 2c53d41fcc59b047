"""Dispatch through shared memory: right in every step of thousands, in chunks too, and in every dtype."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from moe_runtime.errors import PeerLostError
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.parallel import shared_memory
from moe_runtime.parallel.capacity import StepCapacity
from moe_runtime.parallel.host_library import BFLOAT16, FLOAT16, FLOAT32, host_library
from moe_runtime.parallel.host_link import HostLink
from moe_runtime.parallel.shared_memory import SharedMemoryDispatcher
from tests.runtime.host_ranks import check_survivors, run

NUM_EXPERTS, TOP_K, HIDDEN, MAX_TOKENS = 11, 3, 12, 20
CAPACITY = StepCapacity(max_tokens=MAX_TOKENS, hidden_size=HIDDEN, top_k=TOP_K, dtype=torch.float32)
LOST = 2


def _tokens(rank: int, layer: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Small whole numbers, so that sums are exact in float32, and different for each rank, layer and token."""
    t = torch.arange(count)[:, None]
    x = ((layer * 31 + rank * 17 + t * 5) % 101 + torch.arange(HIDDEN) % 7).float()
    ids = (torch.arange(TOP_K) * 3 + t + rank + layer) % NUM_EXPERTS
    weights = ((t + torch.arange(TOP_K) + layer) % 5 + 1).float()
    return x, ids, weights


def _check_layer(
    dispatchers: SharedMemoryDispatcher, counts: tuple[int, ...], layer: int, jitter: random.Random
) -> None:
    rank = dispatchers.link.rank
    x, ids, weights = _tokens(rank, layer, counts[rank])
    step = dispatchers.for_step(counts)
    sent = step.dispatch(x, ids, weights)
    everyone = [_tokens(r, layer, count) for r, count in enumerate(counts)]
    assert torch.equal(sent.x_GH, torch.cat([x for x, _, _ in everyone])), f"layer {layer}: stale tokens"
    assert torch.equal(sent.weights_GK, torch.cat([w for _, _, w in everyone]))
    experts = torch.tensor(ExpertPlacement.contiguous(NUM_EXPERTS, len(counts)).experts_of_rank[rank])
    here = sent.local_ids_GK >= 0
    assert torch.equal(here, torch.isin(torch.cat([ids for _, ids, _ in everyone]), experts)), (
        f"layer {layer}: stale ids"
    )
    expert_GK = experts[sent.local_ids_GK.clamp(min=0)]
    # Expert e gives x + e. What no expert here computed is poisoned: nobody may read it.
    y = ((sent.x_GH[:, None] + expert_GK[..., None]) * (sent.weights_GK * here)[..., None]).sum(1)
    y[~here.any(1)] = float("nan")
    if jitter.random() < 0.02:
        time.sleep(0.001)
    out = step.combine(y, sent)
    expected = ((x[:, None] + ids[..., None]) * weights[..., None]).sum(1)
    assert torch.equal(out, expected), f"layer {layer}: wrong or stale partial sums"


def _run_random_steps(link: HostLink, num_steps: int, in_chunks: bool) -> int:
    if in_chunks:
        shared_memory._PARTS_BYTES = 0  # the smallest chunks
    dispatchers = SharedMemoryDispatcher(link, ExpertPlacement.contiguous(NUM_EXPERTS, link.size), CAPACITY)
    assert (dispatchers.layout.chunk_tokens < MAX_TOKENS) == in_chunks
    shape, jitter = random.Random(7), random.Random(link.rank)  # the same on all ranks; its own
    layer = 0
    for _ in range(num_steps):
        counts = tuple(shape.choice((0, 0, 1, 2, shape.randrange(MAX_TOKENS + 1))) for _ in range(link.size))
        if shape.random() < 0.7:  # without it a step follows upon another at once, with other counts
            assert link.agree([counts[link.rank]]) == [[count] for count in counts]
        for _ in range(shape.randrange(1, 4)):
            _check_layer(dispatchers, counts, layer, jitter)
            layer += 1
    return layer


# With slices as short as a wait, most waits look after their peers before they go on.
@pytest.mark.parametrize(
    ("size", "in_chunks", "slice_s", "num_steps"),
    [(2, False, 0.2, 1500), (3, True, 30e-6, 400), (4, False, 30e-6, 400), (4, True, 0.2, 1500)],
)
def test_random_steps_are_exact(
    size: int, in_chunks: bool, slice_s: float, num_steps: int, tmp_path: Path
) -> None:
    layers = run(_run_random_steps, size, tmp_path, num_steps, in_chunks, slice_s=slice_s)
    assert len(set(layers)) == 1
    assert layers[0] > num_steps


def _lose_a_peer(link: HostLink, when: str) -> list[object]:
    dispatchers = SharedMemoryDispatcher(link, ExpertPlacement.contiguous(NUM_EXPERTS, link.size), CAPACITY)
    counts = (2,) * link.size
    for layer in range(10):
        _check_layer(dispatchers, counts, layer, random.Random(0))
    step = dispatchers.for_step(counts)
    if link.rank == LOST:
        if when == "combine":
            step.dispatch(*_tokens(link.rank, 10, 2))
        os.kill(os.getpid(), signal.SIGKILL)
    start_s = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        _check_layer(dispatchers, counts, 10, random.Random(0))
    return [time.monotonic() - start_s, str(caught.value)]


@pytest.mark.parametrize("when", ["dispatch", "combine"])
def test_survivors_of_a_killed_rank_leave_the_exchange(when: str, tmp_path: Path) -> None:
    check_survivors(_lose_a_peer, 3, LOST, tmp_path, when)


def _sum(rows: list[torch.Tensor], dtype: int) -> torch.Tensor:
    out = torch.full_like(rows[0], float("nan"))
    pointers = (ctypes.c_void_p * len(rows))(*(row.data_ptr() for row in rows))
    host_library().moe_sum_rows(out.data_ptr(), pointers, len(rows), rows[0].numel(), dtype)
    return out


@pytest.mark.parametrize(("dtype", "code"), [(torch.bfloat16, BFLOAT16), (torch.float16, FLOAT16)])
def test_every_16_bit_number_survives_a_sum_of_one(dtype: torch.dtype, code: int) -> None:
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    torch.testing.assert_close(_sum([numbers], code), numbers, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "code"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16), (torch.float16, FLOAT16)]
)
def test_sums_round_as_torch_rounds(dtype: torch.dtype, code: int) -> None:
    generator = torch.Generator().manual_seed(5)
    # Sizes from below float16's smallest number to above its largest; a width that is no multiple of a block.
    scale = torch.logspace(-9, 5, 20_001)
    rows = [(torch.randn(20_001, generator=generator) * scale).to(dtype) for _ in range(3)]
    expected = (rows[0].float() + rows[1].float() + rows[2].float()).to(dtype)
    torch.testing.assert_close(_sum(rows, code), expected, rtol=0, atol=0, equal_nan=True)
