"""Paged attention in native code."""

from __future__ import annotations

import ctypes

import torch

from moe_kernels.attention import reference
from moe_kernels.native.library import native_function
from moe_kernels.sequences import PackedSequences

MAX_HEAD, MAX_GROUP = 256, 32  # MAX_HEAD and ROWS of attention_rows.h

_Pointers = ctypes.c_void_p * 7
_Strides = ctypes.c_int64 * 5
_Sizes = ctypes.c_int64 * 4


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
    isa: str,
) -> torch.Tensor:
    """See `moe_kernels.attention.paged_attention`; other dtypes than float32 and bfloat16 are the reference's."""
    _, block_size, num_kv_heads, head_size = k_cache.shape
    num_heads, dtype = q_TND.shape[1], q_TND.dtype
    given = (q_TND, k_TMD, v_TMD, k_cache, v_cache) + (() if gate_TND is None else (gate_TND,))
    if (
        dtype not in (torch.float32, torch.bfloat16)
        or any(x.dtype != dtype for x in given)
        or head_size > MAX_HEAD
        or num_heads // num_kv_heads > MAX_GROUP
    ):
        return reference.paged_attention(
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
    # Kept by name until the call is over, as only their addresses are handed on.
    q, k, v = _whole_tokens(q_TND), _whole_tokens(k_TMD), _whole_tokens(v_TMD)
    gate = None if gate_TND is None else _whole_tokens(gate_TND)
    out_TND = q.new_empty(q.shape)
    gate_pointer, gate_stride = (None, 0) if gate is None else (gate.data_ptr(), gate.stride(0))
    caches = k_cache.data_ptr(), v_cache.data_ptr()
    native_function("moe_paged_attention", isa)(
        _Pointers(q.data_ptr(), k.data_ptr(), v.data_ptr(), *caches, gate_pointer, out_TND.data_ptr()),
        _Strides(q.stride(0), k.stride(0), v.stride(0), block_tables_BM.stride(0), gate_stride),
        kv_slots_T.data_ptr(),
        block_tables_BM.data_ptr(),
        sequences.cu_seqlens.data_ptr(),
        sequences.context_lens_B.data_ptr(),
        _Sizes(block_size, num_heads, num_kv_heads, head_size),
        scale,
        len(sequences.query_lens),
        dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out_TND


def _whole_tokens(x_TND: torch.Tensor) -> torch.Tensor:
    """x, or a copy where the values of a token do not lie in one piece."""
    lies_whole = x_TND.stride(2) == 1 and x_TND.stride(1) == x_TND.shape[2]
    return x_TND if lies_whole else x_TND.contiguous()
