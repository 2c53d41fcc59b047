"""The Triton implementation of paged attention."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from moe_kernels.attention.decode import decode
from moe_kernels.attention.launch import AttentionLaunch, default_launch
from moe_kernels.attention.prefill import prefill
from moe_kernels.custom_op import custom_op
from moe_kernels.sequences import PackedSequences


@triton.jit
def write_kernel(
    k, v, k_cache, v_cache, slots, k_stride, v_stride, VALUES: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (token): its VALUES values of k and of v."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    slot = tl.load(slots + token).to(tl.int64) * VALUES
    key = tl.load(k + token * k_stride + i, mask=i < VALUES, other=0.0)
    value = tl.load(v + token * v_stride + i, mask=i < VALUES, other=0.0)
    tl.store(k_cache + slot + i, key.to(k_cache.dtype.element_ty), mask=i < VALUES)
    tl.store(v_cache + slot + i, value.to(v_cache.dtype.element_ty), mask=i < VALUES)


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
    launch: AttentionLaunch | None = None,
) -> torch.Tensor:
    """See `moe_kernels.attention.paged_attention`; float32, bfloat16 and float16, caches of q's dtype."""
    tables, n = sequences.prefill_tables, sequences.num_decodes
    return _paged_attention(
        q_TND,
        k_TMD,
        v_TMD,
        k_cache,
        v_cache,
        kv_slots_T,
        block_tables_BM,
        sequences.context_lens_B,
        n,
        *sequences.decode_tokens,
        None if tables is None else tables.tiles_L2,
        None if tables is None else tables.sequences_S8,
        scale,
        gate_TND,
        (launch or default_launch(q_TND.dtype)).to_list(),
    )


def _empty_out(
    q,
    k,
    v,
    k_cache,
    v_cache,
    slots,
    block_tables,
    contexts,
    num_decodes,
    longest,
    total,
    tiles,
    sequences,
    scale,
    gate,
    launch,
):
    return q.new_empty(q.shape)


@custom_op(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
    "Tensor block_tables, Tensor contexts, int num_decodes, int longest, int total, Tensor? tiles, "
    "Tensor? sequences, float scale, Tensor? gate, int[] launch) -> Tensor",
    fake=_empty_out,
)
def _paged_attention(
    q_TND: torch.Tensor,
    k_TMD: torch.Tensor,
    v_TMD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots_T: torch.Tensor,
    block_tables_BM: torch.Tensor,
    context_lens_B: torch.Tensor,
    num_decodes: int,
    longest: int,
    total: int,
    tiles_L2: torch.Tensor | None,
    sequences_S8: torch.Tensor | None,
    scale: float,
    gate_TND: torch.Tensor | None,
    launch: list[int],
) -> torch.Tensor:
    write_kv(k_TMD, v_TMD, k_cache, v_cache, kv_slots_T)
    out_TND = q_TND.new_empty(q_TND.shape)
    q, gate = whole_tokens(q_TND), None if gate_TND is None else whole_tokens(gate_TND)
    cached = (q, k_cache, v_cache, block_tables_BM, context_lens_B)
    # The kernels' exponentials are to base 2, which the hardware has.
    rest = (scale * math.log2(math.e), gate, out_TND, AttentionLaunch.from_list(launch))
    if num_decodes:
        decode(*cached, num_decodes, longest, total, *rest)
    if tiles_L2 is not None and sequences_S8 is not None:
        prefill(*cached, tiles_L2, sequences_S8, *rest)
    return out_TND


def write_kv(
    k_TMD: torch.Tensor,
    v_TMD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots_T: torch.Tensor,
) -> None:
    """Write each token's key and value to its slot of the caches."""
    num_tokens, kv_heads, head_size = k_TMD.shape
    k, v = whole_tokens(k_TMD), whole_tokens(v_TMD)
    if num_tokens:
        write_kernel[(num_tokens,)](
            k, v, k_cache, v_cache, kv_slots_T, k.stride(0), v.stride(0), **write_sizes(kv_heads, head_size)
        )


def write_sizes(kv_heads: int, head_size: int) -> dict[str, int]:
    """The constants of `write_kernel`."""
    values = kv_heads * head_size
    return {"VALUES": values, "BLOCK": triton.next_power_of_2(values)}


def whole_tokens(x_TND: torch.Tensor) -> torch.Tensor:
    """x with a token's heads one after the other; tokens may be any distance apart."""
    return x_TND if x_TND.stride()[1:] == (x_TND.shape[2], 1) else x_TND.contiguous()
