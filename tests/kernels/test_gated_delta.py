"""gated_delta_rule against the recurrence token by token in float64, and against transformers' chunked form."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from moe_kernels.gated_delta import gated_delta_rule
from moe_kernels.sequences import PackedSequences
from tests.kernels.implementations import every_implementation
from tests.kernels.packing import TOLERANCE, assert_near, pack

implementation = every_implementation(gated_delta_rule)

KEY_HEADS, VALUE_HEADS, KEY_SIZE, VALUE_SIZE, SLOTS = 2, 6, 8, 5, 7


@dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    decay: torch.Tensor
    beta: torch.Tensor

    def part(self, start: int, stop: int) -> Inputs:
        return Inputs(*(x[start:stop] for x in (self.q, self.k, self.v, self.decay, self.beta)))


def make(tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, tokens, KEY_HEADS, KEY_SIZE, generator=generator) * 3
    v = torch.randn(tokens, VALUE_HEADS, VALUE_SIZE, generator=generator)
    # Decays from 0.7 to 1 a token: a state lives through several chunks.
    decay = -0.35 * torch.rand(tokens, VALUE_HEADS, generator=generator)
    beta = torch.rand(tokens, VALUE_HEADS, generator=generator)
    decay_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(q.to(dtype), k.to(dtype), v.to(dtype), decay.to(decay_dtype), beta.to(dtype))


def nan_state(dtype: torch.dtype) -> torch.Tensor:
    shape = (SLOTS, VALUE_HEADS, KEY_SIZE, VALUE_SIZE)
    return torch.full(shape, torch.nan, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def run(x: Inputs, state: torch.Tensor, slots: list[int], sequences: PackedSequences) -> torch.Tensor:
    return gated_delta_rule(x.q, x.k, x.v, x.decay, x.beta, state, torch.tensor(slots), sequences)


def recurrence(x: Inputs, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Head by head and token by token, from the definition."""
    out = torch.zeros(x.v.shape, dtype=torch.float64)
    end = torch.zeros(VALUE_HEADS, KEY_SIZE, VALUE_SIZE, dtype=torch.float64)
    if state is not None:
        end = state.double().clone()
    for t in range(x.v.shape[0]):
        for head in range(VALUE_HEADS):
            q, k = (y[t, head // (VALUE_HEADS // KEY_HEADS)].double() for y in (x.q, x.k))
            q, k = q / (q.dot(q) + 1e-6).sqrt() / KEY_SIZE**0.5, k / (k.dot(k) + 1e-6).sqrt()
            s = end[head] * x.decay[t, head].double().exp()
            s = s + torch.outer(k, x.beta[t, head].double() * (x.v[t, head].double() - k @ s))
            out[t, head], end[head] = q @ s, s
    return out, end


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 130])
def test_one_new_sequence(tokens: int, dtype: torch.dtype) -> None:
    x, state = make(tokens, dtype), nan_state(dtype)
    out = run(x, state, [3], pack([tokens], [0]))
    wanted, end = recurrence(x)
    assert out.dtype == dtype
    assert_near(out, wanted)
    assert_near(state[3], end)
    assert state[[0, 1, 2, 4, 5, 6]].isnan().all()


def test_ragged_batch_of_decodes_continued_and_new_sequences() -> None:
    query_lens, context_lens, slots = [1, 1, 9, 70, 0, 1], [5, 66, 3, 0, 2, 0], [6, 0, 2, 5, 4, 1]
    x, state = make(sum(query_lens)), nan_state(torch.float64)
    before = torch.randn(state.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for slot, context in zip(slots, context_lens, strict=True):
        if context:
            state[slot] = before[slot]
    out = run(x, state, slots, pack(query_lens, context_lens, num_decodes=2))
    start = 0
    for count, context, slot in zip(query_lens, context_lens, slots, strict=True):
        wanted, end = recurrence(x.part(start, start + count), before[slot] if context else None)
        assert_near(out[start : start + count], wanted)
        assert_near(state[slot], end)
        start += count
    assert state[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_checkpoints_hold_the_state_after_their_tokens_and_change_nothing_else(dtype: torch.dtype) -> None:
    query_lens, context_lens, slots = [1, 90, 0, 30], [3, 4, 2, 0], [4, 0, 2, 3]
    x = make(sum(query_lens), dtype)
    state = nan_state(dtype).new_full((9, VALUE_HEADS, KEY_SIZE, VALUE_SIZE), torch.nan)
    before = torch.randn(state.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for slot in (4, 0, 2):
        state[slot] = before[slot]
    # The first token of a chunk, its middle, and its end; the slot between is a new sequence's.
    checkpoints = [(1, 1, 5), (1, 64, 6), (1, 90, 7), (3, 17, 8)]
    out = run(x, state, slots, pack(query_lens, context_lens, 1, checkpoints))
    start = 0
    for index, (count, context, slot) in enumerate(zip(query_lens, context_lens, slots, strict=True)):
        first = state.new_tensor(before[slot].tolist()) if context else None
        wanted, end = recurrence(x.part(start, start + count), first)
        assert_near(out[start : start + count], wanted)
        assert_near(state[slot], end)
        for num_tokens, checkpoint in ((n, s) for i, n, s in checkpoints if i == index):
            assert_near(state[checkpoint], recurrence(x.part(start, start + num_tokens), first)[1])
        start += count
    assert state[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("cuts", [[40], [64], [1, 2, 66], [99]])
def test_a_sequence_in_pieces_equals_one_call(cuts: list[int], dtype: torch.dtype) -> None:
    x, state = make(100, dtype), nan_state(dtype)
    bounds = [0, *cuts, 100]
    outs = []
    for start, stop in pairwise(bounds):
        decodes = int(stop - start == 1 and start > 0)
        outs.append(run(x.part(start, stop), state, [1], pack([stop - start], [start], decodes)))
    wanted, end = recurrence(x)
    assert_near(torch.cat(outs), wanted)
    assert_near(state[1], end)


def test_strong_decay_neither_overflows_nor_leaves_a_trace() -> None:
    x, state = make(70, torch.float32), nan_state(torch.float32)
    x.decay.fill_(-60.0)
    assert_near(run(x, state, [0], pack([70], [0])), recurrence(x)[0])


def test_no_tokens() -> None:
    assert run(make(0), nan_state(torch.float64), [], pack([], [])).shape == (0, VALUE_HEADS, VALUE_SIZE)


def test_equals_the_chunked_form_of_transformers() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    x, state = make(150, torch.float32), nan_state(torch.float32)
    out = run(x, state, [0], pack([150], [0]))
    theirs, their_state = torch_chunk_gated_delta_rule(
        *(y[None] for y in (x.q, x.k, x.v)),
        g=x.decay[None],
        beta=x.beta[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    assert_near(out, theirs[0].double())
    assert_near(state[0], their_state[0].double())
