"""Ranks on different devices choose different kernels and serve one model together."""

from __future__ import annotations

import functools
import itertools

import pytest

from moe_kernels.device import DeviceProfile
from moe_kernels.select import cpu_levels
from moe_runtime import LLM, SamplingParams, deployment
from moe_runtime.engine import Engine

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

PROMPTS = [list(range(seed, 40 * seed, seed)) for seed in range(1, 9)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)


def _generate(num_ranks: int) -> tuple[list[list[int]], list[list[float]], list[set[str]]]:
    """Tokens and their log-probabilities of each prompt, and the implementations that each rank runs."""
    with LLM(expert_parallel_size=num_ranks, device="cpu", dtype="float32", use_tqdm=False) as model:
        outputs = [output.outputs[0] for output in model.generate(PROMPTS, GREEDY, use_tqdm=False)]
        plans = [{line.split()[1] for line in report.kernel_plan} for report in model.ranks]
    tokens = [output.token_ids for output in outputs]
    chosen = [
        [step[token].logprob for step, token in zip(output.logprobs or [], output.token_ids, strict=True)]
        for output in outputs
    ]
    return tokens, chosen, plans


def test_outputs_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu_levels(DeviceProfile.query()):
        pytest.skip("every rank on this CPU runs plain torch")
    monkeypatch.setenv("MOE_RUNTIME_KERNELS", "auto")
    tokens, logprobs, _ = _generate(1)
    worker = "tests.runtime.odd_worker:OddWorker"
    monkeypatch.setattr(deployment, "Engine", functools.partial(Engine, worker=worker))
    mixed_tokens, mixed_logprobs, (first, second) = _generate(2)
    assert first != second
    assert second == {"reference:"}
    assert mixed_tokens == tokens
    pairs = zip(itertools.chain(*mixed_logprobs), itertools.chain(*logprobs), strict=True)
    assert max(abs(mixed - alone) for mixed, alone in pairs) < 1e-3
