"""Counter-based random numbers and the draw: known values, independence, distribution, edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_runtime.request import EngineRequest, SamplingParams
from moe_runtime.sampling import Sampler, SamplingBatch, SamplingRow
from moe_runtime.sampling.draw import draw_tokens
from moe_runtime.sampling.uniform import splitmix64, uniforms

DRAWS = 20_000


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def test_generator_gives_the_published_numbers() -> None:
    index = np.arange(5, dtype=np.uint64)
    state = np.full(5, 1234567, dtype=np.uint64)
    assert splitmix64(state, index).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_a_draw_depends_on_its_own_counter_alone() -> None:
    together = uniforms([5, 6, 5, 5], [0, 0, 1, 0], [10, 10, 10, 11])
    alone = [uniforms([s], [i], [p])[0] for s, i, p in [(5, 0, 10), (6, 0, 10), (5, 1, 10), (5, 0, 11)]]
    assert together.tolist() == alone
    assert len(set(alone)) == 4
    assert uniforms([], [], []).shape == (0,)


def test_seeds_are_taken_modulo_two_to_the_64() -> None:
    assert uniforms([-1], [0], [0]) == uniforms([2**64 - 1], [0], [0])
    assert uniforms([3], [0], [0]) == uniforms([2**64 + 3], [0], [0])


@pytest.mark.parametrize("varied", ["seed", "sample_index", "position"])
def test_draws_are_uniform_and_unrelated_along_each_counter(varied: str) -> None:
    counter, fixed = list(range(DRAWS)), [7] * DRAWS
    columns = [counter if name == varied else fixed for name in ("seed", "sample_index", "position")]
    u = uniforms(*columns)
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.bincount((u * 100).astype(int), minlength=100)
    assert chi_square(counts, np.full(100, DRAWS / 100)) < 150  # 99 degrees of freedom: p > 0.0007
    pairs = np.bincount((u[:-1] * 10).astype(int) * 10 + (u[1:] * 10).astype(int), minlength=100)
    assert chi_square(pairs, np.full(100, (DRAWS - 1) / 100)) < 150


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str
)
def test_tokens_follow_the_distribution(params: dict[str, float]) -> None:
    logits_V = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.7, 0.0, -0.5, 1.1])
    request = {"request_id": "a", "sample_index": 0, "params": SamplingParams(**params), "seed": 42}
    rows = tuple(
        SamplingRow.of(EngineRequest(prompt_token_ids=(1,) * (1 + i % 50), **{**request, "seed": i}), [])
        for i in range(DRAWS)
    )
    tokens = Sampler()(logits_V.repeat(DRAWS, 1), SamplingBatch(rows)).token_ids
    p = np.exp(logits_V.double().numpy() / params.get("temperature", 1.0))
    p /= p.sum()
    falling = np.sort(p)[::-1]
    if "top_k" in params:
        p[p < falling[4]] = 0
    if "top_p" in params:
        p[p < falling[(np.cumsum(falling) < 0.8).sum()]] = 0
    if "min_p" in params:
        p[p < 0.1 * p.max()] = 0
    p /= p.sum()
    counts = np.bincount(tokens, minlength=8)
    kept = p > 0
    assert counts[~kept].sum() == 0
    assert chi_square(counts[kept], DRAWS * p[kept]) < 25  # at most 7 degrees of freedom: p > 0.0007


@pytest.mark.parametrize("vocab", [1, 2, 511, 512, 513, 3000])
def test_draws_equal_a_running_sum_over_the_whole_row(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    weights_RV = torch.rand(400, vocab, generator=generator) ** 8
    weights_RV[:, ::3] *= (torch.rand(400, len(weights_RV[0, ::3]), generator=generator) > 0.9).float()
    weights_RV[:, 0] += 1e-6
    u_R = torch.rand(400, generator=generator, dtype=torch.float64)
    sums_RV = weights_RV.double().numpy().cumsum(-1)
    expected = (sums_RV <= (u_R.numpy() * sums_RV[:, -1])[:, None]).sum(-1)
    assert draw_tokens(weights_RV, u_R).tolist() == expected.tolist()


@pytest.mark.parametrize("only", [0, 511, 512, 1023, 1499])
def test_a_token_of_weight_0_is_never_drawn(only: int) -> None:
    weights_RV = torch.zeros(3, 1500)
    weights_RV[:, only] = 1e-30
    extremes = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(weights_RV, extremes).tolist() == [only] * 3
    weights_RV[:, [5, 700]] = 1.0
    assert draw_tokens(weights_RV, extremes).tolist()[0] == min(only, 5)
    assert set(draw_tokens(weights_RV, extremes).tolist()) <= {only, 5, 700}
