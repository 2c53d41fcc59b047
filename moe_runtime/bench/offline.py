"""What benchmarks of an `LLM` share: random prompts, greedy requests of a fixed length, facts of the deployment."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.request import SamplingParams

if TYPE_CHECKING:
    from moe_runtime.llm import LLM

logger = logging.getLogger(__name__)

_SHORTEST_S = 0.05  # of a phase that can be told: a driver may wake milliseconds after a token is there


def random_batch(rng: random.Random, num_requests: int, input_len: int, vocab_size: int) -> list[list[int]]:
    """Prompts of `input_len` token ids. New ones for each batch, so that nothing is found in a cache."""
    return [[rng.randrange(vocab_size) for _ in range(input_len)] for _ in range(num_requests)]


def greedy(output_len: int) -> SamplingParams:
    """Of a request that goes on to its full length, in tokens, whatever they are."""
    return SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)


def warn_if_short(what: str, seconds: float) -> None:
    """Say that a phase took too little time for its rates to mean much."""
    if seconds < _SHORTEST_S:
        logger.warning(
            "%s took %.2g s, too short for the driver's clock, so its rates mean little; give longer prompts and "
            "outputs, or a larger model",
            what,
            seconds,
        )


def short_name(model: str) -> str:
    """Of a directory its last part: a random checkpoint's parents mean nothing."""
    return Path(model).name if Path(model).is_absolute() else model


def deployment_facts(llm: LLM) -> dict[str, Any]:
    """The model and the ranks, for a report's workload."""
    return {
        "model": short_name(llm.files.name),
        "parameters": llm.info.num_parameters,
        "dtype": llm.config.dtype if llm.config.dtype != "auto" else llm.info.dtype,
        "expert_parallel_size": llm.config.expert_parallel_size,
        "threads_per_rank": llm.ranks[0].threads,
    }
