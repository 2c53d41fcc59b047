"""The best token: the first of those that tie, in any dtype, whatever the number of rows."""

from __future__ import annotations

import pytest
import torch

from moe_runtime.errors import MoeRuntimeError
from moe_runtime.request import SamplingParams
from moe_runtime.sampling import Sampler, SamplingBatch, SamplingRow
from moe_runtime.sampling import sampler as sampler_module


def _greedy(logits_NV: torch.Tensor) -> list[int]:
    row = SamplingRow(
        params=SamplingParams(temperature=0.0),
        seed=0,
        sample_index=0,
        prompt_token_ids=(1,),
        output_token_ids=[],
        stop_ids=frozenset(),
    )
    return Sampler()(logits_NV, SamplingBatch((row,) * logits_NV.shape[0])).token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements_at_once", [1, 100, 1 << 20])
def test_ties_go_to_the_lowest_token(
    dtype: torch.dtype, elements_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_module, "_ELEMENTS_AT_ONCE", elements_at_once)
    generator = torch.Generator().manual_seed(3)
    logits_NV = torch.randint(-4, 5, (37, 51), generator=generator).to(dtype)  # many ties
    expected = [min(i for i, value in enumerate(row) if value == max(row)) for row in logits_NV.tolist()]
    assert _greedy(logits_NV) == expected
    assert _greedy(logits_NV.T.contiguous().T) == expected  # not contiguous


def test_nan_is_found_wherever_it_is() -> None:
    logits_NV = torch.zeros(3, 1000)
    logits_NV[1, 777] = float("nan")
    with pytest.raises(MoeRuntimeError, match="sequence 1 of 3"):
        _greedy(logits_NV)
