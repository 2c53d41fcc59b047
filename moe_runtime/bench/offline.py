"""What benchmarks of an `LLM` share: random prompts, greedy requests of a fixed length, facts of the deployment."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from moe_runtime.request import SamplingParams

if TYPE_CHECKING:
    from moe_runtime.llm import LLM


def random_batch(rng: random.Random, num_requests: int, input_len: int, vocab_size: int) -> list[list[int]]:
    """Prompts of `input_len` token ids. New ones for each batch, so that nothing is found in a cache."""
    return [[rng.randrange(vocab_size) for _ in range(input_len)] for _ in range(num_requests)]


def greedy(output_len: int) -> SamplingParams:
    """Of a request that goes on to its full length, in tokens, whatever they are."""
    return SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)


def deployment_facts(llm: LLM) -> dict[str, Any]:
    """The model and the ranks, for a report's workload."""
    return {
        "model": llm.files.name,
        "parameters": llm.info.num_parameters,
        "dtype": llm.config.dtype if llm.config.dtype != "auto" else llm.info.dtype,
        "expert_parallel_size": llm.config.expert_parallel_size,
        "threads_per_rank": llm.ranks[0].threads,
    }
