"""Paged causal attention, a sequence at a time, in plain torch: the specification of `paged_attention`.

Shape legend: T tokens, B sequences, M block-table width, N query heads, D head size, S tokens attended to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from moe_kernels.numerics import accumulation_dtype
from moe_kernels.sequences import PackedSequences


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
) -> torch.Tensor:
    """See `moe_kernels.attention.paged_attention`."""
    k_cache.flatten(0, 1)[kv_slots_T] = k_TMD.to(k_cache.dtype)
    v_cache.flatten(0, 1)[kv_slots_T] = v_TMD.to(v_cache.dtype)
    out_TND = torch.empty_like(q_TND)
    block_size = k_cache.shape[1]
    start = 0
    for index, (count, context) in enumerate(zip(sequences.query_lens, sequences.context_lens, strict=True)):
        tokens = slice(start, start + count)
        start += count
        if count == 0:
            continue
        length = context + count
        blocks = block_tables_BM[index, : -(-length // block_size)]
        keys = k_cache[blocks].flatten(0, 1)[:length]
        values = v_cache[blocks].flatten(0, 1)[:length]
        out_TND[tokens] = _attend(q_TND[tokens], keys, values, scale)
    return out_TND if gate_TND is None else out_TND * torch.sigmoid(gate_TND)


def _attend(q_TND: torch.Tensor, k_SMD: torch.Tensor, v_SMD: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last T of S tokens, in float32 (float64 for float64)."""
    dtype = accumulation_dtype(q_TND.dtype)
    q, k, v = (x.to(dtype).transpose(0, 1)[None] for x in (q_TND, k_SMD, v_SMD))
    num_queries, length = q.shape[2], k.shape[2]
    mask = None
    if 1 < num_queries < length:
        everything = torch.ones(num_queries, length, dtype=torch.bool, device=q.device)
        mask = everything.tril(diagonal=length - num_queries)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=num_queries == length, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).to(q_TND.dtype)
