"""Log-probabilities: those of the model's own logits, with ranks, for outputs and prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_runtime.request import EngineRequest, SamplingParams
from moe_runtime.sampling import Sampler, SamplingBatch, SamplingRow, logprobs, prompt_logprobs


def row(seed: int = 3, **params: object) -> SamplingRow:
    request = EngineRequest(
        request_id="a",
        sample_index=0,
        prompt_token_ids=(1, 2),
        params=SamplingParams(**params),
        seed=seed,
    )
    return SamplingRow.of(request, [4])


def log_softmax(logits_V: torch.Tensor) -> np.ndarray:
    x = logits_V.double().numpy()
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def random_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_output_logprobs_are_raw_and_hold_the_sampled_token_and_the_best() -> None:
    logits_NV = random_logits(40, 30)
    params = {"temperature": 3.0, "presence_penalty": 1.0, "top_k": 20, "logit_bias": {2: 4.0}}
    rows = [row(seed=i, logprobs=4, **params) for i in range(40)]
    output = Sampler()(logits_NV, SamplingBatch(tuple(rows)))
    outside_best = 0
    for logits, token, found in zip(logits_NV, output.token_ids, output.logprobs, strict=True):
        assert found is not None
        expected = log_softmax(logits)
        best = np.argsort(-expected)[:4].tolist()
        assert list(found) == [token, *(t for t in best if t != token)]
        for t, (logprob, rank) in found.items():
            assert logprob == pytest.approx(expected[t], abs=1e-5)
            assert rank == 1 + (expected > expected[t]).sum()
        outside_best += token not in best
    assert outside_best > 3


def test_only_rows_that_ask_get_logprobs_each_as_many_as_it_asked() -> None:
    rows = (row(), row(logprobs=0), row(logprobs=2, temperature=0), row(logprobs=-1), row(logprobs=99))
    output = Sampler()(random_logits(5, 30), SamplingBatch(rows))
    assert output.logprobs[0] is None
    assert [len(found) for found in output.logprobs[1:] if found is not None][0:2] == [1, 2]
    assert len(output.logprobs[3] or ()) == len(output.logprobs[4] or ()) == 30
    assert list(output.logprobs[1] or ()) == [output.token_ids[1]]


def test_tokens_that_tie_share_a_rank() -> None:
    logits_NV = torch.tensor([[1.0, 3.0, 3.0, 0.0, 1.0]])
    (found,) = logprobs.ranked_logprobs(logits_NV, torch.tensor([4]), [-1])
    assert {token: rank for token, (_, rank) in found.items()} == {4: 3, 0: 3, 1: 1, 2: 1, 3: 5}


@pytest.mark.parametrize("k", [0, 3, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_logprobs_hold_the_actual_token_and_the_best(k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    # Quarters are exact in bfloat16 and none tie.
    logits_PV = torch.stack([torch.randperm(25, generator=generator) / 4 for _ in range(6)]).to(dtype)
    next_ids = [3, 0, 24, 7, 7, 1]
    found = prompt_logprobs(logits_PV, next_ids, k)
    for logits, actual, entry in zip(logits_PV, next_ids, found, strict=True):
        expected = log_softmax(logits)
        order = np.argsort(-expected).tolist()
        best = order[: 25 if k == -1 else k]
        assert list(entry) == [actual, *(t for t in best if t != actual)]
        for token, (logprob, rank) in entry.items():
            assert logprob == pytest.approx(expected[token], abs=1e-5)
            assert rank == 1 + order.index(token)


def test_prompt_logprobs_in_slices_equal_those_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_PV, next_ids = random_logits(7, 25, seed=2), [1, 2, 3, 4, 5, 6, 7]
    whole = prompt_logprobs(logits_PV, next_ids, 2)
    monkeypatch.setattr(logprobs, "_ELEMENTS_AT_ONCE", 50)
    assert prompt_logprobs(logits_PV, next_ids, 2) == whole
    assert prompt_logprobs(logits_PV[:0], [], 2) == []
