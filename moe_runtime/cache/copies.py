"""Copies inside the cache tensors, before a step: the states and partly filled blocks that sequences go on from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_models.interfaces import KVCache, LayerCache, StateCache


def copy_states(caches: Sequence[LayerCache], copies: Sequence[tuple[int, int]]) -> None:
    """Copy state slots (from, to) in every linear-attention layer; all are read before any is written."""
    states = [cache for cache in caches if isinstance(cache, StateCache)]
    if states:
        sources, targets = _indices(copies, states[0].state.device)
        for cache in states:
            cache.conv[targets] = cache.conv[sources]
            cache.state[targets] = cache.state[sources]


def copy_blocks(caches: Sequence[LayerCache], copies: Sequence[tuple[int, int]]) -> None:
    """Copy KV blocks (from, to) in every full-attention layer; all are read before any is written."""
    pages = [cache for cache in caches if isinstance(cache, KVCache)]
    if pages:
        sources, targets = _indices(copies, pages[0].k.device)
        for cache in pages:
            cache.k[targets] = cache.k[sources]
            cache.v[targets] = cache.v[sources]


def _indices(copies: Sequence[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.tensor(copies, dtype=torch.int64).to(device, non_blocking=True)
    return both[:, 0], both[:, 1]
