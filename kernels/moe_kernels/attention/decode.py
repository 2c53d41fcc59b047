"""The Triton kernels for decodes: a sequence's context in splits that run in parallel, then their sum.

A program attends to one split with all query heads of a key head, so that each key is read once. A sequence
of one split is finished by its program; the splits of others leave normalised sums and the base-2 logarithms of
their weights' totals, which `reduce_kernel` puts together.

Shape legend: T tokens, B sequences, M key heads, G query heads of a key head, N query heads, D head size.
Source: Flash-Decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.attention.launch import AttentionLaunch
from moe_kernels.attention.softmax import attend, attention_sizes

REDUCE_SPLITS = 16  # at a time


@triton.jit
def store_gated(x, gate, out, mask, HAS_GATE: tl.constexpr):
    """x sigmoid(gate) to `out`; `gate` and `out` are pointers of x's shape."""
    if HAS_GATE:
        x *= tl.sigmoid(tl.load(gate, mask=mask, other=0.0).to(tl.float32))
    tl.store(out, x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["table_stride", "split_tokens", "num_splits"])
def decode_kernel(
    q,
    k_cache,
    v_cache,
    tables,
    contexts,
    gate,
    out,
    partial,
    partial_log,
    table_stride,
    split_tokens,
    num_splits,
    q_stride,
    gate_stride,
    scale_log2,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (split, key head, sequence); sequence i is token i."""
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    length = tl.load(contexts + token) + 1
    start = split * split_tokens
    if start >= length:
        return
    GROUP: tl.constexpr = HEADS // KV_HEADS
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    inside = (r < GROUP)[:, None] & (d < D)[None, :]
    head_R = kv_head * GROUP + r
    in_token = head_R[:, None] * D + d[None, :]
    q_RD = tl.load(q + token * q_stride + in_token, mask=inside, other=0.0)
    stop = tl.minimum(start + split_tokens, length)
    acc_RD, max_R, sum_R = attend(
        q_RD,
        tl.zeros((BLOCK_R,), tl.int32) + stop,
        tl.zeros((BLOCK_R, BLOCK_D), tl.float32),
        tl.full((BLOCK_R,), -float("inf"), tl.float32),
        tl.zeros((BLOCK_R,), tl.float32),
        k_cache,
        v_cache,
        tables + token * table_stride,
        kv_head,
        start,
        stop,
        stop - 1,
        scale_log2,
        MASKED=True,
        BLOCK_SIZE=BLOCK_SIZE,
        KV_HEADS=KV_HEADS,
        D=D,
        BLOCK_S=BLOCK_S,
        PRECISION=PRECISION,
    )
    x_RD = acc_RD / sum_R[:, None]
    if length <= split_tokens:
        at_gate = gate + token * gate_stride + in_token
        store_gated(x_RD, at_gate, out + token * (HEADS * D) + in_token, inside, HAS_GATE)
    else:
        row_R = (token * HEADS + head_R) * num_splits + split
        tl.store(partial + row_R[:, None] * D + d[None, :], x_RD, mask=inside)
        tl.store(partial_log + row_R, max_R + tl.log2(sum_R), mask=r < GROUP)


@triton.jit(do_not_specialize=["split_tokens", "num_splits"])
def reduce_kernel(
    partial,
    partial_log,
    contexts,
    gate,
    out,
    split_tokens,
    num_splits,
    gate_stride,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (query head, sequence): P splits at a time."""
    head = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    count = tl.cdiv(tl.load(contexts + token) + 1, split_tokens)
    if count == 1:
        return
    d = tl.arange(0, BLOCK_D)
    row = (token * HEADS + head) * num_splits
    acc_D = tl.zeros((BLOCK_D,), tl.float32)
    max_1 = -float("inf")
    sum_1 = 0.0
    for first in range(0, count, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < count)[:, None] & (d < D)[None, :]
        log_P = tl.load(partial_log + row + p, mask=p < count, other=-float("inf"))
        x_PD = tl.load(partial + (row + p)[:, None] * D + d[None, :], mask=inside, other=0.0)
        new_max_1 = tl.maximum(max_1, tl.max(log_P))
        weight_P = tl.exp2(log_P - new_max_1)
        shrink_1 = tl.exp2(max_1 - new_max_1)
        acc_D = acc_D * shrink_1 + tl.sum(x_PD * weight_P[:, None], axis=0)
        sum_1 = sum_1 * shrink_1 + tl.sum(weight_P)
        max_1 = new_max_1
    in_token = head * D + d
    at_gate = gate + token * gate_stride + in_token
    store_gated(acc_D / sum_1, at_gate, out + token * (HEADS * D) + in_token, d < D, HAS_GATE)


def decode(
    q_TND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables_BM: torch.Tensor,
    context_lens_B: torch.Tensor,
    num_decodes: int,
    longest: int,
    total: int,
    scale_log2: float,
    gate_TND: torch.Tensor | None,
    out_TND: torch.Tensor,
    launch: AttentionLaunch,
) -> None:
    """Fill the first `num_decodes` rows of out; heads are contiguous in q and gate.

    Args:
        longest: tokens that the longest of these sequences attends to.
        total: tokens that all of them do.
    """
    (_, heads, head_size), (_, block_size, kv_heads, _) = q_TND.shape, k_cache.shape
    sizes = attention_sizes(heads, kv_heads, head_size, block_size, q_TND.dtype)
    split_tokens, num_splits = launch.splits(num_decodes * kv_heads, longest, total * kv_heads)
    # One split needs neither; what they point to does not change what is compiled.
    rows = num_decodes * heads * num_splits if num_splits > 1 else 0
    partial = torch.empty(rows, head_size, dtype=torch.float32, device=q_TND.device)
    partial_log = torch.empty(rows, dtype=torch.float32, device=q_TND.device)
    gate = q_TND if gate_TND is None else gate_TND
    decode_kernel[(num_splits, kv_heads, num_decodes)](
        q_TND,
        k_cache,
        v_cache,
        block_tables_BM,
        context_lens_B,
        gate,
        out_TND,
        partial,
        partial_log,
        block_tables_BM.stride(0),
        split_tokens,
        num_splits,
        q_TND.stride(0),
        gate.stride(0),
        scale_log2,
        **sizes,
        HAS_GATE=gate_TND is not None,
        **launch.decode_blocks(heads // kv_heads),
        num_warps=launch.decode_warps,
        num_stages=launch.decode_stages,
    )
    if num_splits > 1:
        reduce_kernel[(heads, num_decodes)](
            partial,
            partial_log,
            context_lens_B,
            gate,
            out_TND,
            split_tokens,
            num_splits,
            gate.stride(0),
            HEADS=heads,
            D=head_size,
            BLOCK_D=sizes["BLOCK_D"],
            HAS_GATE=gate_TND is not None,
            BLOCK_P=REDUCE_SPLITS,
        )
