"""LLM with quantised weights on Ray ranks, against transformers with the values that the codes stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_runtime import LLM, SamplingParams
from moe_runtime.errors import ConfigError
from tests.checkpoints import (
    load_reference,
    make_checkpoint,
    make_variant,
    reference_greedy,
    reference_logprobs,
)
from tests.quantized_checkpoints import LARGE_ENOUGH, rounded_fp8, rounded_int8, to_fp8

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, prompt_logprobs=-1)


def _check(llm: LLM, values: Path) -> None:
    model = load_reference(values)
    prompts = [[(7 * i * i + 3 * k) % 257 for i in range(length)] for k, length in enumerate((1, 64, 21))]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], GREEDY, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        rows = [row for row in output.prompt_logprobs or [] if row]
        found = torch.tensor([[row[token].logprob for token in range(257)] for row in rows]).reshape(-1, 257)
        difference = (found - reference_logprobs(model, prompt)[:-1]).abs()
        assert difference.numel() == 0 or difference.max() <= 1e-4
        assert output.outputs[0].token_ids == reference_greedy(model, prompt, NUM_TOKENS)


def test_int8_on_two_ranks(tmp_path: Path) -> None:
    make_variant(tmp_path / "saved", "base", seed=11)
    rounded_int8(tmp_path / "saved", tmp_path / "values")
    with LLM(tmp_path / "saved", quantization="int8", expert_parallel_size=2, use_tqdm=False) as llm:
        assert llm.info.quantization == "int8"
        assert all("weights in int8" in "".join(rank.kernel_plan) for rank in llm.ranks)
        # What was announced is what the fullest rank holds.
        assert max(rank.weight_bytes for rank in llm.ranks) == llm.info.weight_bytes_per_rank(2)
        _check(llm, tmp_path / "values")


def test_an_fp8_checkpoint_on_three_ranks(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "saved", seed=12, **LARGE_ENOUGH)
    to_fp8(tmp_path / "saved", tmp_path / "fp8", num_shards=2)
    rounded_fp8(tmp_path / "fp8", tmp_path / "values")
    with LLM(tmp_path / "fp8", expert_parallel_size=3, use_tqdm=False) as llm:
        assert llm.info.quantization == "fp8"
        assert max(rank.weight_bytes for rank in llm.ranks) == llm.info.weight_bytes_per_rank(3)
        _check(llm, tmp_path / "values")


@pytest.mark.slow
def test_an_fp8_checkpoint_in_int8(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "saved", seed=13, **LARGE_ENOUGH)
    to_fp8(tmp_path / "saved", tmp_path / "fp8")
    rounded_fp8(tmp_path / "fp8", tmp_path / "values", then_int8=True)
    with LLM(tmp_path / "fp8", quantization="int8", expert_parallel_size=2, use_tqdm=False) as llm:
        _check(llm, tmp_path / "values")


def test_int8_on_gpu_ranks_is_refused_before_anything_starts(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="'int8' is for CPU ranks, and these would run on cuda"):
        LLM(tmp_path, quantization="int8", device="cuda", use_tqdm=False)
