"""Causal grouped-query attention over packed sequences whose keys and values live in pages.

Shape legend: T tokens, B sequences, N query heads, M key/value heads (block-table width in BM), D head size.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_kernels.implementations import find_implementation
from moe_kernels.sequences import PackedSequences

_TABLE = {
    "reference": "moe_kernels.attention.reference:paged_attention",
    "cpu": "moe_kernels.attention.cpu:paged_attention",
    "triton": "moe_kernels.attention.triton:paged_attention",
    "flashinfer": "moe_kernels.attention.flashinfer:paged_attention",
}


def paged_attention(
    q_TND: torch.Tensor,
    k_TMD: torch.Tensor,
    v_TMD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots_T: torch.Tensor,
    block_tables_BM: torch.Tensor,
    sequences: PackedSequences,
    scale: float,
    gate_TND: torch.Tensor | None = None,
    *,
    implementation: str = "reference",
    launch: Any = None,
) -> torch.Tensor:
    """Write k and v to the caches, then softmax(scale q k^T) v for each token over its own past: out_TND.

    Caches are contiguous [blocks, block_size, M, D]; `kv_slots_T` says where each token's key and value go
    (block * block_size + offset), `block_tables_BM` (int32) in which blocks each sequence lives, in order.
    Consecutive N / M query heads share a key head. Softmax in float32 (float64 for float64). With
    `gate_TND` the result is multiplied by its sigmoid.
    """
    run = find_implementation("attention", _TABLE, implementation)
    arguments = (
        q_TND,
        k_TMD,
        v_TMD,
        k_cache,
        v_cache,
        kv_slots_T,
        block_tables_BM,
        sequences,
        scale,
        gate_TND,
    )
    return run(*arguments) if launch is None else run(*arguments, launch=launch)
