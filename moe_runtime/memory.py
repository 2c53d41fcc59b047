"""How much of a rank's memory its caches may take, and the longest sequence that then fits."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from moe_models.interfaces import LayerCacheSpec
from moe_runtime.cache.sizing import CachePlan, bytes_per_sequence, bytes_per_token, plan_caches
from moe_runtime.config import EngineConfig

# On a CPU caches compete with everything else on the machine: a quarter of what is free, and not more than this.
_CPU_BUDGET_BYTES = 4 << 30
# On a GPU, left free beside the measured peak: fragments, and buffers that the collectives allocate later.
_GPU_RESERVE_SHARE = 0.02


def plan_rank_caches(
    specs: Sequence[LayerCacheSpec],
    config: EngineConfig,
    device: torch.device,
    model_length: int,
    ranks_on_node: int,
    work_space_bytes: int,
) -> tuple[CachePlan, int]:
    """Sizes of this rank's caches, and `max_model_len`; called once the weights are in memory.

    A length that the user gave must fit. The model's own is lowered to what fits.

    Args:
        work_space_bytes: what a step of the worst kind allocates on the device beside weights and caches.

    Raises:
        ConfigError: the budget does not hold one sequence of the length that was asked for.
    """
    budget = config.kv_cache_memory_bytes or _default_budget(config, device, ranks_on_node, work_space_bytes)
    length = min(config.max_model_len or model_length, model_length)
    if config.max_model_len is None:
        length = min(length, _longest(specs, budget, config.block_size) or length)
    plan = plan_caches(
        specs,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=length,
        budget_bytes=budget,
        prefix_caching=config.enable_prefix_caching,
    )
    return plan, length


def _default_budget(
    config: EngineConfig, device: torch.device, ranks_on_node: int, work_space_bytes: int
) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used_by_us_and_others = total - free
        usable = (config.gpu_memory_utilization - _GPU_RESERVE_SHARE) * total
        return max(0, int(usable) - used_by_us_and_others - work_space_bytes)
    return min(_CPU_BUDGET_BYTES, psutil.virtual_memory().available // 4 // ranks_on_node)


def _longest(specs: Sequence[LayerCacheSpec], budget: int, block_size: int) -> int:
    """Tokens of one sequence that fit beside the padding block and slot, in whole blocks; 0 if none does."""
    block_bytes = bytes_per_token(specs) * block_size
    if not block_bytes:
        return 0
    blocks = (budget - 2 * bytes_per_sequence(specs)) // block_bytes - 1
    return max(0, blocks * block_size)
