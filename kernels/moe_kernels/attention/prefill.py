"""The Triton kernel for prefills: causal flash attention over paged keys, which hold the new tokens', too.

The rows of a program are the queries of some consecutive tokens and all heads of one key head, so that a short
prompt fills a tile and little of a tile is above the diagonal.

Shape legend: T tokens, L tiles, R rows of a program, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.attention.decode import store_gated
from moe_kernels.attention.launch import AttentionLaunch
from moe_kernels.attention.softmax import attend, attention_sizes
from moe_kernels.sequences import PREFILL_CHUNK


@triton.jit
def _halves(x_RD):
    """The left and the right half of x's columns."""
    R: tl.constexpr = x_RD.shape[0]
    HALF: tl.constexpr = x_RD.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x_RD, (R, 2, HALF)), (0, 2, 1)))


@triton.jit(do_not_specialize=["table_stride"])
def prefill_kernel(
    q,
    k_cache,
    v_cache,
    tables,
    contexts,
    gate,
    out,
    tiles,
    sequences,
    table_stride,
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
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (TOKENS of the tile's tokens, key head, tile from the last)."""
    # The last tokens of a sequence have the most to do: they start first.
    tile = tiles + (tl.num_programs(2) - 1 - tl.program_id(2)) * 2
    kv_head = tl.program_id(1)
    sequence = sequences + tl.load(tile) * 8
    first = tl.load(tile + 1)
    offset = first + tl.program_id(0) * TOKENS
    count = tl.minimum(tl.load(sequence + 3), first + TILE)  # where the sequence or the tile ends
    if offset >= count:
        return
    index = tl.load(sequence).to(tl.int64)
    context = tl.load(contexts + index)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    t_R = offset + r // GROUP
    in_R = (r < TOKENS * GROUP) & (t_R < count)
    token_R = (tl.load(sequence + 2) + t_R).to(tl.int64)
    head_R = kv_head * GROUP + r % GROUP
    at = q + (token_R * q_stride + head_R * D)[:, None] + d[None, :]
    q_RD = tl.load(at, mask=in_R[:, None] & (d < D)[None, :], other=0.0)

    acc_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    max_R = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    sum_R = tl.zeros((BLOCK_R,), tl.float32)
    table = tables + index * table_stride
    limit_R = context + t_R + 1
    # All rows attend to all of these; the steps after them cross the diagonal.
    before = (context + offset + 1) // BLOCK_S * BLOCK_S
    end = context + tl.minimum(offset + TOKENS, count)
    for part in tl.static_range(2):
        acc_RD, max_R, sum_R = attend(
            q_RD,
            limit_R,
            acc_RD,
            max_R,
            sum_R,
            k_cache,
            v_cache,
            table,
            kv_head,
            0 if part == 0 else before,
            before if part == 0 else end,
            end - 1,
            scale_log2,
            MASKED=part == 1,
            BLOCK_SIZE=BLOCK_SIZE,
            KV_HEADS=KV_HEADS,
            D=D,
            BLOCK_S=BLOCK_S,
            PRECISION=PRECISION,
        )
    # By quarters of a head: the gates of whole ones do not fit in the registers beside the sums.
    low_RD, high_RD = _halves(acc_RD / sum_R[:, None])
    for half in tl.static_range(2):
        pair = _halves(low_RD if half == 0 else high_RD)
        for quarter in tl.static_range(2):
            columns = (half * 2 + quarter) * (BLOCK_D // 4) + tl.arange(0, BLOCK_D // 4)[None, :]
            at_gate = gate + (token_R * gate_stride + head_R * D)[:, None] + columns
            at_out = out + (token_R * (HEADS * D) + head_R * D)[:, None] + columns
            store_gated(pair[quarter], at_gate, at_out, in_R[:, None] & (columns < D), HAS_GATE)


def prefill(
    q_TND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables_BM: torch.Tensor,
    context_lens_B: torch.Tensor,
    tiles_L2: torch.Tensor,
    sequences_S8: torch.Tensor,
    scale_log2: float,
    gate_TND: torch.Tensor | None,
    out_TND: torch.Tensor,
    launch: AttentionLaunch,
) -> None:
    """Fill the prefills' rows of out; heads are contiguous in q and gate."""
    (_, heads, head_size), (_, block_size, kv_heads, _) = q_TND.shape, k_cache.shape
    blocks = launch.prefill_blocks(heads // kv_heads)
    gate = q_TND if gate_TND is None else gate_TND
    prefill_kernel[(triton.cdiv(PREFILL_CHUNK, blocks["TOKENS"]), kv_heads, tiles_L2.shape[0])](
        q_TND,
        k_cache,
        v_cache,
        block_tables_BM,
        context_lens_B,
        gate,
        out_TND,
        tiles_L2,
        sequences_S8,
        block_tables_BM.stride(0),
        q_TND.stride(0),
        gate.stride(0),
        scale_log2,
        **attention_sizes(heads, kv_heads, head_size, block_size, q_TND.dtype),
        HAS_GATE=gate_TND is not None,
        **blocks,
        num_warps=launch.prefill_warps,
        num_stages=launch.prefill_stages,
    )
