"""What a step of the worst kind needs beside weights and caches: measured on GPUs before the caches are made.

Shape legend: T tokens of this rank, G tokens after dispatch, H hidden, K top-k.
"""

from __future__ import annotations

import torch

from moe_models.interfaces import CausalLM, Dispatched
from moe_runtime.batching import BatchBuilder
from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.cache.pool import allocate
from moe_runtime.cache.sizing import CachePlan
from moe_runtime.cache.slots import SlotAllocator
from moe_runtime.config import EngineConfig
from moe_runtime.request import EngineRequest, SamplingParams
from moe_runtime.scheduler import Scheduler, SchedulerConfig


class WorstRoutingDispatcher:
    """Every rank has as many tokens as this one, and sends all of them here."""

    def __init__(self, num_ranks: int, num_local_experts: int) -> None:
        self._num_ranks = num_ranks
        self._num_local_experts = num_local_experts

    def dispatch(
        self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> Dispatched:
        """G = ranks * T rows, all of whose experts are local."""
        return Dispatched(
            x_GH=x_TH.repeat(self._num_ranks, 1),
            local_ids_GK=topk_ids_TK.repeat(self._num_ranks, 1) % self._num_local_experts,
            weights_GK=topk_weights_TK.repeat(self._num_ranks, 1),
            handle=x_TH.shape[0],
        )

    def combine(self, y_GH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Some rows of the right number."""
        return y_GH[: dispatched.handle]


def work_space_bytes(
    model: CausalLM, config: EngineConfig, num_ranks: int, num_local_experts: int, device: torch.device
) -> int:
    """Peak bytes on the device during one prompt of `max_num_batched_tokens` tokens with the worst routing.

    0 on CPUs, whose budget is a stated one.
    """
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run_worst_step(model, config, WorstRoutingDispatcher(num_ranks, num_local_experts), device)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak


@torch.inference_mode()
def run_worst_step(
    model: CausalLM, config: EngineConfig, dispatcher: WorstRoutingDispatcher, device: torch.device
) -> torch.Tensor:
    """One step of one long prompt, and the logits of as many rows as sequences may run."""
    num_tokens, block_size = config.max_num_batched_tokens, config.block_size
    num_blocks = -(-(num_tokens + 1) // block_size) + 1  # for one token more, and block 0
    plan = CachePlan(block_size=block_size, num_blocks=num_blocks, num_slots=2, bytes=0)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=1,
            max_num_batched_tokens=num_tokens,
            block_size=block_size,
            max_model_len=num_tokens + 1,
            enable_prefix_caching=False,
        ),
        BlockAllocator(num_blocks, block_size),
        SlotAllocator(plan.num_slots),
    )
    scheduler.add(
        EngineRequest(
            request_id="profile",
            sample_index=0,
            prompt_token_ids=(0,) * num_tokens,
            params=SamplingParams(max_tokens=1),
            seed=0,
        )
    )
    step = scheduler.schedule()
    batch = BatchBuilder(block_size, device).build(step)
    hidden_TH = model(batch, allocate(model.cache_specs(), plan, device), dispatcher)
    return model.compute_logits(hidden_TH[: config.max_num_seqs])
