"""The sampler against slow, obvious float64 formulas, row by row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import MoeRuntimeError
from moe_runtime.request import EngineRequest, SamplingParams
from moe_runtime.sampling import Sampler, SamplingBatch, SamplingRow
from moe_runtime.sampling.uniform import uniforms

SMALL_ROUNDS = (2, 5)  # so that top-p meets every size of list in a small vocabulary


def row(
    prompt: Sequence[int] = (1, 2),
    outputs: Sequence[int] = (),
    sample: int = 0,
    seed: int = 11,
    **params: object,
) -> SamplingRow:
    request = EngineRequest(
        request_id="a",
        sample_index=sample,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**{"max_tokens": None, **params}),
        seed=seed,
        eos_token_ids=(0, 10**6),  # the second is outside every vocabulary here
    )
    return SamplingRow.of(request, list(outputs))


def sample(
    logits_NV: torch.Tensor, rows: Sequence[SamplingRow], rounds: Sequence[int] = SMALL_ROUNDS
) -> list[int]:
    return Sampler(rounds)(logits_NV, SamplingBatch(tuple(rows))).token_ids


def reference_logits(logits_V: np.ndarray, r: SamplingRow) -> np.ndarray:
    x = logits_V.astype(np.float64)
    p = r.params
    for token, value in (p.logit_bias or {}).items():
        x[token] += value
    if len(r.output_token_ids) < p.min_tokens:
        for token in r.stop_ids:
            if token < len(x):
                x[token] = -math.inf
    for token in {*r.prompt_token_ids, *r.output_token_ids}:
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token, count in Counter(r.output_token_ids).items():
        x[token] -= count * p.frequency_penalty + p.presence_penalty
    return x


def reference_probabilities(logits_V: np.ndarray, r: SamplingRow) -> np.ndarray:
    """What a random row is drawn from, by sorting everything."""
    x = reference_logits(logits_V, r) / r.params.temperature
    weights = np.exp(x - x.max())
    weights[weights < r.params.min_p * weights.max()] = 0
    if 0 < r.params.top_k < len(x):
        weights[weights < np.sort(weights)[-r.params.top_k]] = 0
    if r.params.top_p < 1:
        falling = np.sort(weights)[::-1]
        last = int((np.cumsum(falling) < r.params.top_p * falling.sum()).sum())
        weights[weights < falling[last]] = 0
    return weights / weights.sum()


def reference_draw(logits_V: np.ndarray, r: SamplingRow) -> int:
    u = uniforms([r.seed], [r.sample_index], [r.position])[0]
    return int((np.cumsum(reference_probabilities(logits_V, r)) <= u).sum())


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 10_000},
    {"top_k": -1},
    {"top_p": 1e-9},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.9999, "temperature": 3.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.8},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.1, "temperature": 1.7},
    {"min_p": 0.02, "top_p": 0.95, "temperature": 2.0},
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_draws_equal_the_full_sort_reference(params: dict[str, float]) -> None:
    logits_NV = random_logits(200, 97, seed=3)
    rows = [row(seed=i, sample=i % 3, prompt=[1] * (1 + i % 7), **params) for i in range(200)]
    expected = [reference_draw(logits.numpy(), r) for logits, r in zip(logits_NV, rows, strict=True)]
    assert sample(logits_NV, rows) == expected
    assert len(set(expected)) > 10


def test_rows_of_all_kinds_share_a_batch() -> None:
    params = [*FILTERS, {"temperature": 0.0}, {"temperature": 0.0, "presence_penalty": 1.0}]
    logits_NV = random_logits(len(params) * 5, 1200, seed=4, scale=2.0)
    rows = [row(seed=i, outputs=[5, 9], **params[i % len(params)]) for i in range(len(logits_NV))]
    before = logits_NV.clone()
    for r, logits, token in zip(rows, logits_NV, sample(logits_NV, rows, rounds=(64, 512)), strict=True):
        x = reference_logits(logits.numpy(), r)
        assert token == (x.argmax() if r.is_greedy else reference_draw(logits.numpy(), r))
    assert torch.equal(logits_NV, before)


PENALTIES = [
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -1.5},
    {"presence_penalty": 2.0},
    {"presence_penalty": -2.0, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    {"logit_bias": {3: 2.5, 7: -1.0}},
    {"min_tokens": 5},
    {"min_tokens": 4},
    {"min_tokens": 9, "stop_token_ids": [6, 7], "ignore_eos": True},
    {"min_tokens": 9, "stop_token_ids": [6], "logit_bias": {6: 100.0, 0: 100.0}, "repetition_penalty": 1.1},
]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("params", PENALTIES, ids=str)
def test_penalties_bias_and_min_tokens_equal_the_formulas(
    params: dict[str, object], temperature: float
) -> None:
    logits_NV = random_logits(100, 12, seed=5, scale=1.5)
    rows = [
        row(prompt=[1, 2, 2, 8], outputs=[3, 3, 5, 11], seed=i, temperature=temperature, **params)
        for i in range(len(logits_NV))
    ]
    expected = [
        int(reference_logits(x.numpy(), r).argmax()) if r.is_greedy else reference_draw(x.numpy(), r)
        for x, r in zip(logits_NV, rows, strict=True)
    ]
    assert sample(logits_NV, rows) == expected
    plain = [
        row(prompt=r.prompt_token_ids, outputs=r.output_token_ids, seed=r.seed, temperature=temperature)
        for r in rows
    ]
    untouched = params == {"min_tokens": 4}  # reached: four tokens are there
    assert (sample(logits_NV, plain) == expected) == untouched


def test_forced_and_forbidden_tokens() -> None:
    logits_NV = random_logits(300, 8, seed=6)
    forced = [row(seed=i, logit_bias={5: 100.0}) for i in range(300)]
    assert set(sample(logits_NV, forced)) == {5}
    forbidden = [row(seed=i, logit_bias={5: -math.inf}, temperature=1e38) for i in range(300)]
    assert set(sample(logits_NV, forbidden)) == {0, 1, 2, 3, 4, 6, 7}
    only = [
        row(seed=i, logit_bias=dict.fromkeys(range(7), -math.inf), top_p=0.5, top_k=3) for i in range(300)
    ]
    assert set(sample(logits_NV, only)) == {7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_of_tied_tokens(dtype: torch.dtype) -> None:
    logits_NV = torch.zeros(3, 50_000, dtype=dtype)
    logits_NV[0, [40_000, 17, 300]] = 2.0
    logits_NV[1, [49_999, 20_000]] = 1.0
    expected = [17, 20_000, 0]
    greedy = row(temperature=0)
    assert sample(logits_NV, [greedy] * 3) == expected
    assert sample(logits_NV, [row(temperature=0, logit_bias={9: -1.0})] * 3) == expected


@pytest.mark.parametrize(
    "params", [{"top_k": 2}, {"top_p": 0.6}, {"top_p": 0.6, "top_k": 2}, {"min_p": 1.0}], ids=str
)
def test_tokens_that_tie_with_the_last_one_kept_are_kept(params: dict[str, float]) -> None:
    logits_NV = torch.tensor([[1.0, 5.0, 5.0, 0.0, 5.0, 2.0]]).repeat(200, 1)
    assert set(sample(logits_NV, [row(seed=i, **params) for i in range(200)])) == {1, 2, 4}


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-6, 1e-5, 1e-4])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits_NV = random_logits(50, 300, seed=7, scale=20)
    rows = [row(seed=i, temperature=temperature, top_p=0.9) for i in range(50)]
    assert sample(logits_NV, rows) == logits_NV.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e30, 1e300])
def test_huge_temperatures_are_uniform(temperature: float) -> None:
    logits_NV = random_logits(2000, 5, seed=8, scale=30)
    counts = Counter(sample(logits_NV, [row(seed=i, temperature=temperature) for i in range(2000)]))
    assert all(320 < counts[token] < 480 for token in range(5))


def test_no_rows() -> None:
    output = Sampler()(torch.empty(0, 10), SamplingBatch(()))
    assert (output.token_ids, output.logprobs) == ([], [])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"temperature": 1}, {"top_p": 0.5, "top_k": 3}], ids=str
)
def test_logits_that_are_not_finite_are_reported(bad: float, params: dict[str, float]) -> None:
    logits_NV = random_logits(4, 600)
    logits_NV[2, 100] = bad
    with pytest.raises(
        MoeRuntimeError, match="logits of sequence 2 of 4 in this step have no finite maximum"
    ):
        sample(logits_NV, [row(**params)] * 4)


PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_k": st.integers(-1, 40),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "logit_bias": st.dictionaries(st.integers(0, 31), st.floats(-10, 10), max_size=3),
        "min_tokens": st.integers(0, 4),
        "logprobs": st.integers(0, 3),
    },
)
ROWS = st.lists(
    st.tuples(PARAMS, st.integers(0, 2**63 - 1), st.lists(st.integers(0, 31), max_size=5)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=80, deadline=None)
@given(ROWS, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_a_row_gets_the_same_token_alone_and_in_any_batch(
    rows_spec: list, logits_seed: int, shuffler
) -> None:  # type: ignore[no-untyped-def,type-arg]
    rows = [row(seed=seed, outputs=outputs, **params) for params, seed, outputs in rows_spec]
    logits_NV = random_logits(len(rows), 32, seed=logits_seed)
    sampler = Sampler(SMALL_ROUNDS)
    alone = [sampler(logits_NV[i : i + 1], SamplingBatch((rows[i],))) for i in range(len(rows))]
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    together = sampler(logits_NV[order], SamplingBatch(tuple(rows[i] for i in order)))
    assert together.token_ids == [alone[i].token_ids[0] for i in order]
    assert together.logprobs == [alone[i].logprobs[0] for i in order]


def test_rows_see_tokens_appended_to_their_list() -> None:
    outputs: list[int] = []
    request = EngineRequest(
        request_id="a",
        sample_index=0,
        prompt_token_ids=(1,),
        params=SamplingParams(temperature=0, presence_penalty=2.0),
        seed=1,
    )
    live = SamplingRow.of(request, outputs)
    logits_NV = torch.tensor([[3.0, 2.5, 0.0]])
    for expected in (0, 1, 0, 0):
        (token,) = sample(logits_NV, [live])
        assert token == expected
        outputs.append(token)
    assert live.position == 5
