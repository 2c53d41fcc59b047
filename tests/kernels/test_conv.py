"""causal_conv1d against sums written out in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from moe_kernels.conv import causal_conv1d
from tests.kernels.implementations import every_implementation
from tests.kernels.packing import TOLERANCE, assert_near, pack

implementation = every_implementation(causal_conv1d)

CHANNELS, SLOTS = 11, 6


def by_hand(inputs: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    """SiLU of the convolution of the last `count` rows of `inputs` (all of them there: no padding needed)."""
    inputs, weight = inputs.double(), weight.double()
    width = weight.shape[1]
    out = torch.zeros(count, CHANNELS, dtype=torch.float64)
    for t in range(count):
        for tap in range(width):
            out[t] += inputs[inputs.shape[0] - count + t - (width - 1) + tap] * weight[:, tap]
    return out / (1 + (-out).exp())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [2, 4])
def test_ragged_batch_with_rubbish_in_new_slots(width: int, dtype: torch.dtype) -> None:
    # Decodes, a continued chunk shorter than the history, a long one, new ones shorter and longer.
    query_lens, context_lens, slots = [1, 1, 2, 65, 1, 7], [3, 9, 5, 4, 0, 0], [4, 0, 5, 1, 3, 2]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(query_lens), CHANNELS, generator=generator).to(dtype)
    weight = torch.randn(CHANNELS, width, generator=generator).to(dtype)
    state = torch.full((SLOTS, CHANNELS, width - 1), torch.nan, dtype=dtype)
    before = torch.randn(SLOTS, width - 1, CHANNELS, generator=generator).to(dtype)
    for slot, context in zip(slots, context_lens, strict=True):
        if context:
            state[slot] = before[slot].t()
        else:
            before[slot] = 0
    out = causal_conv1d(x, weight, state, torch.tensor(slots), pack(query_lens, context_lens, 2))
    assert out.dtype == dtype
    start = 0
    for count, slot in zip(query_lens, slots, strict=True):
        inputs = torch.cat([before[slot], x[start : start + count]])
        assert_near(out[start : start + count], by_hand(inputs, weight, count))
        assert torch.equal(state[slot], inputs[-(width - 1) :].t())
        start += count


@pytest.mark.parametrize("cuts", [[1, 2, 3], [5], [2, 4]])
def test_a_sequence_in_pieces_equals_one_call(cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(8, CHANNELS, generator=generator), torch.randn(CHANNELS, 4, generator=generator)
    state = torch.full((SLOTS, CHANNELS, 3), torch.nan)
    slots = torch.tensor([2])
    whole = causal_conv1d(x, weight, state, slots, pack([8], [0]))
    end = state[2].clone()
    bounds = [0, *cuts, 8]
    outs = []
    for start, stop in pairwise(bounds):
        sequences = pack([stop - start], [start], int(stop - start == 1 and start > 0))
        outs.append(causal_conv1d(x[start:stop], weight, state, slots, sequences))
    # Not bit for bit: the SiLU of vector lanes and of their remainder differ in the last place.
    assert_near(torch.cat(outs), whole.double(), 1e-6)
    assert torch.equal(state[2], end)


def test_checkpoints_hold_the_state_after_their_tokens_and_change_nothing_else() -> None:
    query_lens, context_lens, slots = [1, 9, 0, 5], [3, 4, 2, 0], [4, 0, 2, 3]
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(15, CHANNELS, generator=generator), torch.randn(CHANNELS, 4, generator=generator)
    before = torch.randn(9, CHANNELS, 3, generator=generator)

    def run(checkpoints: list[tuple[int, int, int]], lens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        state = before.clone()
        tokens = torch.cat([part[:n] for part, n in zip(x.split(query_lens), lens, strict=True)])
        sequences = pack(lens, context_lens, 1, checkpoints)
        return causal_conv1d(tokens, weight, state, torch.tensor(slots), sequences), state

    plain, end = run([], query_lens)
    # The first token of a chunk, its middle and its end; fewer tokens than the history in a new sequence.
    out, state = run([(1, 1, 5), (1, 6, 6), (1, 9, 7), (3, 2, 8)], query_lens)
    assert torch.equal(out, plain)
    assert torch.equal(state[:5], end[:5])
    for index, num_tokens, slot in [(1, 1, 5), (1, 6, 6), (1, 9, 7), (3, 2, 8)]:
        cut = [n if i != index else num_tokens for i, n in enumerate(query_lens)]
        assert torch.equal(state[slot], run([], cut)[1][slots[index]])


def test_no_tokens() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    out = causal_conv1d(
        torch.empty(0, CHANNELS),
        torch.ones(CHANNELS, 4),
        torch.empty(SLOTS, CHANNELS, 3),
        empty,
        pack([], []),
    )
    assert out.shape == (0, CHANNELS)
