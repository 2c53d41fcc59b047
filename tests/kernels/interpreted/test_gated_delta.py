"""The Triton kernels of the gated delta rule against the recurrence in float64, and the gates."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from moe_kernels.gated_delta import delta_gates, gated_delta_rule
from moe_kernels.sequences import PackedSequences
from tests.kernels.packing import assert_near, pack
from tests.kernels.test_gated_delta import (
    KEY_HEADS,
    KEY_SIZE,
    VALUE_HEADS,
    VALUE_SIZE,
    Inputs,
    make,
    nan_state,
    recurrence,
)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _rubbish_in_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `new_empty` and `empty` return is NaN until it is written."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))


def run(
    x: Inputs,
    state: torch.Tensor,
    slots: list[int],
    sequences: PackedSequences,
    device: str = "cpu",
    implementation: str = "triton",
) -> torch.Tensor:
    """The rule on slices of one wide tensor, as the layer has them."""
    widths = [KEY_HEADS * KEY_SIZE, KEY_HEADS * KEY_SIZE, VALUE_HEADS * VALUE_SIZE]
    wide = torch.cat([y.flatten(1) for y in (x.q, x.k, x.v)], dim=1).to(device)
    q, k, v = wide.split(widths, dim=1)
    return gated_delta_rule(
        q.unflatten(1, (KEY_HEADS, KEY_SIZE)),
        k.unflatten(1, (KEY_HEADS, KEY_SIZE)),
        v.unflatten(1, (VALUE_HEADS, VALUE_SIZE)),
        x.decay.to(device),
        x.beta.to(device),
        state,
        torch.tensor(slots, device=device),
        sequences,
        implementation=implementation,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 64, 130])
def test_one_new_sequence(tokens: int, dtype: torch.dtype) -> None:
    x, state = make(tokens, dtype), nan_state(dtype)
    out = run(x, state, [3], pack([tokens], [0]))
    wanted, end = recurrence(x)
    assert out.dtype == dtype
    assert_near(out, wanted)
    # The state is float32, but its updates come from products of the inputs' type.
    assert_near(state[3], end, 2e-2 if dtype == torch.bfloat16 else None)
    assert state[[0, 1, 2, 4, 5, 6]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decodes_prefills_and_checkpoints_in_one_step(dtype: torch.dtype) -> None:
    # Decodes, a continued sequence, one without tokens, new ones.
    query_lens, context_lens, slots = [1, 1, 90, 0, 30, 1], [5, 66, 4, 2, 0, 0], [4, 9, 5, 2, 3, 10]
    x = make(sum(query_lens), dtype)
    state = nan_state(dtype).new_full((12, VALUE_HEADS, KEY_SIZE, VALUE_SIZE), torch.nan)
    before = torch.randn(state.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float32)
    for slot, context in zip(slots, context_lens, strict=True):
        if context:
            state[slot] = before[slot]
    # The first token of a chunk, its middle, and its end.
    checkpoints = [(2, 1, 0), (2, 64, 6), (2, 90, 7), (4, 17, 8)]
    out = run(x, state, slots, pack(query_lens, context_lens, 2, checkpoints))
    of_state = 2e-2 if dtype == torch.bfloat16 else None
    start = 0
    for index, (count, context, slot) in enumerate(zip(query_lens, context_lens, slots, strict=True)):
        first = before[slot] if context else None
        wanted, end = recurrence(x.part(start, start + count), first)
        assert_near(out[start : start + count], wanted)
        assert_near(state[slot], end, of_state)
        for num_tokens, checkpoint in ((n, s) for i, n, s in checkpoints if i == index):
            assert_near(state[checkpoint], recurrence(x.part(start, start + num_tokens), first)[1], of_state)
        start += count
    assert state[[1, 11]].isnan().all()


def test_decodes_alone_need_no_tables() -> None:
    x, state = make(3, torch.float32), nan_state(torch.float32)
    before = torch.randn(3, *state.shape[1:], generator=torch.Generator().manual_seed(9))
    state[[5, 0, 2]] = before
    sequences = pack([1, 1, 1], [7, 1, 900], 3)
    out = run(x, state, [5, 0, 2], sequences)
    assert sequences.prefill_tables is None
    for i, slot in enumerate([5, 0, 2]):
        wanted, end = recurrence(x.part(i, i + 1), before[i])
        assert_near(out[i : i + 1], wanted)
        assert_near(state[slot], end)


def test_equal_keys_do_not_blow_up_the_solve() -> None:
    x, state = make(128, torch.float32), nan_state(torch.float32)
    x.k.copy_(x.k[:1].expand_as(x.k))
    x.decay.zero_()
    x.beta.fill_(1.0)
    wanted, end = recurrence(x)
    assert_near(run(x, state, [0], pack([128], [0])), wanted)
    assert_near(state[0], end)


def test_strong_decay_neither_overflows_nor_leaves_a_trace() -> None:
    x, state = make(70, torch.float32), nan_state(torch.float32)
    x.decay.fill_(-60.0)
    assert_near(run(x, state, [0], pack([70], [0])), recurrence(x)[0])


def test_short_keys_are_divided_by_no_less_than_their_floor() -> None:
    # A decode and a prefill of vectors whose squares sum to about what is added to them.
    x, state = make(4, torch.float32), nan_state(torch.float32)
    x.q.mul_(1e-3 * KEY_SIZE**-0.5)
    x.k.mul_(1e-3 * KEY_SIZE**-0.5)
    before = torch.randn(state.shape[1:], generator=torch.Generator().manual_seed(9))
    state[5] = before
    out = run(x, state, [5, 2], pack([1, 3], [7, 0], 1))
    for slot, part, first in ((5, x.part(0, 1), before), (2, x.part(1, 4), None)):
        wanted, end = recurrence(part, first)
        assert_near(out[:1] if slot == 5 else out[1:], wanted)
        assert_near(state[slot], end)


def test_no_tokens() -> None:
    out = run(make(0, torch.float32), nan_state(torch.float32), [], pack([], []))
    assert out.shape == (0, VALUE_HEADS, VALUE_SIZE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_gates(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randn(tokens, 2 * 7, generator=generator) * 20).to(dtype).chunk(2, dim=1)
    a_log, dt_bias = torch.randn(2, 7, generator=generator)
    decay, beta = delta_gates(a, b, a_log, dt_bias, implementation="triton")
    softplus = torch.nn.functional.softplus(a.double() + dt_bias.double(), threshold=1e9)
    wanted = -a_log.double().exp() * softplus
    assert decay.dtype == torch.float32
    assert beta.dtype == dtype
    torch.testing.assert_close(decay.double(), wanted, rtol=2e-5, atol=0)
    assert_near(beta, b.double().sigmoid())


class FlaStandIn:
    """Takes the place of flash-linear-attention: records its arguments and computes with the reference."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def chunk_gated_delta_rule(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append({"q": q, "k": k, "v": v, **options})
        state, lens = options["initial_state"].clone(), options["cu_seqlens"].diff().tolist()
        g, beta = options["g"][0], options["beta"][0]
        slots = torch.arange(len(lens))
        return gated_delta_rule(q[0], k[0], v[0], g, beta, state, slots, pack(lens, [1] * len(lens)))[
            None
        ], state


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> FlaStandIn:
    module, stand_in = types.ModuleType("fla.ops.gated_delta_rule"), FlaStandIn()
    module.chunk_gated_delta_rule = stand_in.chunk_gated_delta_rule  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    return stand_in


def _mixed_step(
    checkpoints: list[tuple[int, int, int]], implementation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two decodes, a continued sequence, one without tokens, a new one."""
    query_lens, context_lens, slots = [1, 1, 20, 0, 9], [5, 66, 4, 2, 0], [4, 0, 6, 2, 3]
    state = nan_state(torch.bfloat16)
    state[[4, 0, 6, 2]] = torch.randn(4, *state.shape[1:], generator=torch.Generator().manual_seed(9))
    x = make(sum(query_lens), torch.bfloat16)
    sequences = pack(query_lens, context_lens, 2, checkpoints)
    return run(x, state, slots, sequences, implementation=implementation), state


def test_fla_is_given_the_prefills_and_its_states_are_kept(fla: FlaStandIn) -> None:
    out, state = _mixed_step([], "fla")
    wanted, wanted_state = _mixed_step([], "reference")
    assert_near(out, wanted.double())
    assert state[[1, 5]].isnan().all()
    used = [0, 2, 3, 4, 6]
    assert_near(state[used], wanted_state[used].double(), 2e-2)  # its keys are rounded to bfloat16
    (call,) = fla.calls
    assert call["q"].shape == call["k"].shape == (1, 29, VALUE_HEADS, KEY_SIZE)
    assert call["v"].shape == (1, 29, VALUE_HEADS, VALUE_SIZE)
    assert call["g"].shape == call["beta"].shape == (1, 29, VALUE_HEADS)
    assert call["cu_seqlens"].dtype == torch.int64
    assert call["cu_seqlens"].tolist() == [0, 20, 29]
    assert call["initial_state"].dtype == torch.float32
    assert not call["initial_state"][1].any()
    assert call["output_final_state"]
    norms = torch.cat([call["q"], call["k"]], dim=1).float().norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-2, atol=0)


def test_fla_is_told_where_chunks_start(fla: FlaStandIn) -> None:
    x, state = make(200, torch.bfloat16), nan_state(torch.bfloat16)
    run(x, state, [3, 0, 5, 1], pack([64, 0, 71, 65], [0] * 4), implementation="fla")
    assert fla.calls[0]["chunk_indices"].dtype == torch.int64
    assert fla.calls[0]["chunk_indices"].tolist() == [[0, 0], [1, 0], [1, 1], [2, 0], [2, 1]]


def test_steps_with_checkpoints_are_not_given_to_fla(fla: FlaStandIn) -> None:
    out, state = _mixed_step([(2, 7, 5)], "fla")
    wanted, wanted_state = _mixed_step([(2, 7, 5)], "reference")
    assert not fla.calls
    assert_near(out, wanted.double())
    assert_near(state[5], wanted_state[5].double(), 2e-2)
