"""The cache tensors of a rank, made from the model's specifications and the plan of their sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_models.interfaces import KVCache, KVCacheSpec, LayerCache, LayerCacheSpec, StateCache
from moe_runtime.cache.sizing import CachePlan


def allocate(
    specs: Sequence[LayerCacheSpec], plan: CachePlan, device: torch.device | str
) -> tuple[LayerCache, ...]:
    """One cache a layer, in layer order, `plan.bytes` bytes in all.

    Zeroed: a masked position has weight 0 in attention, and 0 times the NaN that fresh memory may hold is
    NaN.
    """
    return tuple(_allocate_layer(spec, plan, device) for spec in specs)


def _allocate_layer(spec: LayerCacheSpec, plan: CachePlan, device: torch.device | str) -> LayerCache:
    if isinstance(spec, KVCacheSpec):
        shape = (plan.num_blocks, plan.block_size, spec.num_kv_heads, spec.head_size)
        return KVCache(
            k=torch.zeros(shape, dtype=spec.dtype, device=device),
            v=torch.zeros(shape, dtype=spec.dtype, device=device),
        )
    return StateCache(
        conv=torch.zeros(
            (plan.num_slots, spec.conv_channels, spec.conv_width), dtype=spec.conv_dtype, device=device
        ),
        state=torch.zeros(
            (plan.num_slots, spec.num_heads, spec.key_size, spec.value_size),
            dtype=spec.state_dtype,
            device=device,
        ),
    )
