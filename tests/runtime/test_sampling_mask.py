"""TokenMask: the logits of the tokens that a row may not take become -inf, whatever the rows beside it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from moe_runtime.errors import MoeRuntimeError
from moe_runtime.request import SamplingParams, StructuredOutputsParams
from moe_runtime.sampling import Sampler, SamplingBatch, SamplingRow, TokenMask
from moe_runtime.sampling.mask import apply_mask, forbid_on_device

STRUCTURED = StructuredOutputsParams(regex="a")


def _packed(allowed_SV: np.ndarray) -> torch.Tensor:
    padded = np.pad(allowed_SV, ((0, 0), (0, -allowed_SV.shape[1] % 32)), constant_values=True)
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


def _row(**params: object) -> SamplingRow:
    return SamplingRow(
        params=SamplingParams(**{"structured_outputs": STRUCTURED, **params}),  # type: ignore[arg-type]
        seed=5,
        sample_index=0,
        prompt_token_ids=[1],
        output_token_ids=[],
        stop_ids=frozenset(),
    )


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("apply", [apply_mask, forbid_on_device])
def test_exactly_the_forbidden_tokens_of_the_masked_rows_become_impossible(
    vocab: int, apply: Callable[[torch.Tensor, TokenMask], None]
) -> None:
    draw = np.random.default_rng(vocab)
    logits = torch.from_numpy(draw.standard_normal((5, vocab)).astype(np.float32))
    allowed = draw.random((3, vocab)) < 0.5
    rows = (4, 0, 3)
    wanted = logits.clone()
    for row, allowed_V in zip(rows, allowed, strict=True):
        wanted[row][~torch.from_numpy(allowed_V)] = -math.inf
    apply(logits, TokenMask(rows, _packed(allowed)))
    assert torch.equal(logits, wanted)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 1.5},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.1},
        {"temperature": 1.0, "min_p": 0.9, "top_k": 900},
        {"temperature": 0, "logit_bias": {7: 100.0}, "repetition_penalty": 2.0, "presence_penalty": 1.0},
    ],
    ids=str,
)
def test_only_allowed_tokens_are_sampled_with_every_parameter(params: dict[str, object]) -> None:
    draw = np.random.default_rng(0)
    structured, free = _row(**params), _row(**params, structured_outputs=None)
    for _ in range(20):
        logits = torch.from_numpy(draw.standard_normal((3, 1000)).astype(np.float32))
        allowed = np.zeros((1, 1000), dtype=bool)
        allowed[0, draw.choice(1000, 5)] = True
        mask = TokenMask((1,), _packed(allowed))
        before = logits.clone()
        batch = SamplingBatch((free, structured, _row(temperature=0, structured_outputs=None)))
        sampled = Sampler()(logits, batch, mask)
        assert allowed[0, sampled.token_ids[1]]
        assert torch.equal(logits, before)
        alone = Sampler()(logits[1:2], SamplingBatch((structured,)), TokenMask((0,), mask.allowed_SW))
        assert alone.token_ids == sampled.token_ids[1:2]
        assert Sampler()(logits[:1], SamplingBatch((free,))).token_ids == sampled.token_ids[:1]


def test_a_row_without_any_token_is_stuck_and_the_others_are_sampled() -> None:
    logits = torch.arange(6.0).reshape(2, 3)
    batch = SamplingBatch((_row(temperature=1.0), _row(temperature=0)))
    mask = TokenMask((0, 1), _packed(np.array([[False] * 3, [True, True, False]])))
    sampled = Sampler()(logits, batch, mask)
    assert (sampled.stuck, sampled.token_ids[1]) == ((0,), 1)


@pytest.mark.parametrize("structured", [None, STRUCTURED])
def test_broken_logits_are_the_models_fault_still(structured: StructuredOutputsParams | None) -> None:
    batch = SamplingBatch((_row(structured_outputs=structured),))
    mask = TokenMask((0,), _packed(np.ones((1, 3), dtype=bool))) if structured else None
    with pytest.raises(MoeRuntimeError, match="have no finite maximum"):
        Sampler()(torch.full((1, 3), math.nan), batch, mask)
