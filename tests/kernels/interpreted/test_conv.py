"""The Triton convolution where a step is shorter than the history, beside what `test_layer_operations.py` runs."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.conv import causal_conv1d
from tests.kernels.packing import assert_near, pack
from tests.kernels.test_conv import CHANNELS, by_hand


@pytest.fixture(autouse=True)
def _rubbish_in_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `new_empty` returns is NaN until it is written."""
    new_empty = torch.Tensor.new_empty

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))


@pytest.mark.parametrize("width", [2, 4])
def test_sequences_and_checkpoints_shorter_than_the_history(width: int) -> None:
    # A decode, a continued sequence, none, new ones.
    query_lens, context_lens, slots = [1, 2, 0, 1, 2, 7], [9, 5, 2, 0, 0, 0], [4, 5, 7, 3, 0, 2]
    checkpoints = [(1, 1, 8), (4, 1, 9), (5, 1, 10), (5, 2, 11)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(query_lens), CHANNELS, generator=generator)
    weight = torch.randn(CHANNELS, width, generator=generator)
    state = torch.full((12, CHANNELS, width - 1), torch.nan)
    before = torch.randn(12, width - 1, CHANNELS, generator=generator)
    for slot, context in zip(slots, context_lens, strict=True):
        if context:
            state[slot] = before[slot].t()
        else:
            before[slot] = 0
    sequences = pack(query_lens, context_lens, 1, checkpoints)
    out = causal_conv1d(x, weight, state, torch.tensor(slots), sequences, implementation="triton")
    start = 0
    for index, (count, slot) in enumerate(zip(query_lens, slots, strict=True)):
        inputs = torch.cat([before[slot], x[start : start + count]])
        assert_near(out[start : start + count], by_hand(inputs, weight, count))
        assert torch.equal(state[slot], inputs[count:].t())
        for num_tokens, kept in ((n, s) for i, n, s in checkpoints if i == index):
            assert torch.equal(state[kept], inputs[num_tokens : num_tokens + width - 1].t())
        start += count
    assert state[[1, 6]].isnan().all()


def test_decodes_alone_need_no_tables() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, m, generator=generator) for n, m in ((3, CHANNELS), (CHANNELS, 4)))
    state = torch.randn(5, CHANNELS, 3, generator=generator)
    slots = torch.tensor([4, 0, 2])
    ours, theirs = state.clone(), state.clone()
    sequences = pack([1, 1, 1], [9, 1, 2], 3)
    out = causal_conv1d(x, weight, ours, slots, sequences, implementation="triton")
    assert sequences.prefill_tables is None
    assert_near(out, causal_conv1d(x, weight, theirs, slots, sequences).double())
    assert torch.equal(ours, theirs)


def test_no_tokens() -> None:
    state, slots = torch.empty(1, CHANNELS, 3), torch.empty(0, dtype=torch.int64)
    out = causal_conv1d(
        torch.empty(0, CHANNELS), torch.ones(CHANNELS, 4), state, slots, pack([], []), implementation="triton"
    )
    assert out.shape == (0, CHANNELS)
