"""LocalRank: scheduler, runner and a real tiny model in this process, without Ray."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_models.interfaces import CausalLM, ExpertShard
from moe_models.local_dispatch import LocalDispatcher
from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.cache.pool import allocate
from moe_runtime.cache.sizing import CachePlan
from moe_runtime.cache.slots import SlotAllocator
from moe_runtime.request import EngineRequest, SamplingParams
from moe_runtime.runner import Runner
from moe_runtime.sampling.logprobs import RankedLogprobs
from moe_runtime.scheduler import Scheduler, SchedulerConfig, Sequence

BLOCK = 16


class LocalRank:
    """One rank that serves requests step by step and counts the tokens that it computes."""

    def __init__(self, model: CausalLM, *, blocks: int = 200, slots: int = 24, **config: object) -> None:
        limits = {"max_num_seqs": 4, "max_num_batched_tokens": 256, "max_model_len": 512, **config}
        limits.setdefault("state_checkpoint_interval", 128)
        plan = CachePlan(block_size=BLOCK, num_blocks=blocks + 1, num_slots=slots + 1, bytes=0)
        caches = allocate(model.cache_specs(), plan, "cpu")
        for cache in caches:
            for name in cache.__slots__:
                getattr(cache, name).fill_(torch.nan)  # whatever is read before it was written shows
        self.scheduler = Scheduler(
            SchedulerConfig(block_size=BLOCK, **limits),  # type: ignore[arg-type]
            BlockAllocator(blocks + 1, BLOCK),
            SlotAllocator(slots + 1),
        )
        vocab_size = model.config.vocab_size  # type: ignore[union-attr]
        self.runner = Runner(model, caches, block_size=BLOCK, vocab_size=vocab_size)  # type: ignore[arg-type]
        self.dispatcher = LocalDispatcher(ExpertShard.whole(model.config.num_experts))  # type: ignore[union-attr,arg-type]
        self.num_computed_tokens = 0
        self.prompt_logprobs: dict[Sequence, list[RankedLogprobs]] = {}

    def add(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int = 8,
        *,
        sample: int = 0,
        priority: int = 0,
        **params: object,
    ) -> Sequence:
        """A greedy request unless `params` say something else."""
        return self.scheduler.add(
            EngineRequest(
                request_id=name,
                sample_index=sample,
                prompt_token_ids=tuple(prompt),
                params=SamplingParams(
                    **{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **params}
                ),  # type: ignore[arg-type]
                seed=11,
                priority=priority,
            )
        )

    def step(self) -> None:
        step = self.scheduler.schedule()
        self.num_computed_tokens += step.num_tokens
        result = self.runner.run(step, self.dispatcher)
        self.scheduler.update(step, result.token_ids)
        for sequence, found in result.prompt_logprobs.items():
            self.prompt_logprobs.setdefault(sequence, []).extend(found)

    def run(self, after_each: Callable[[], None] = lambda: None) -> int:
        """Steps until nothing is left; returns the tokens that they computed."""
        before = self.num_computed_tokens
        while self.scheduler.has_work:
            self.step()
            after_each()
        return self.num_computed_tokens - before
