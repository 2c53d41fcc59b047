"""The loop that both attention kernels share: online softmax over a stretch of one sequence's paged keys.

Shape legend: R rows (queries of one key head), S tokens attended to at a time, D head size.
Source: Online normalizer calculation for softmax (arXiv:1805.02867), as in FlashAttention (arXiv:2205.14135).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _slots(table, position_S, BLOCK_SIZE: tl.constexpr):
    """Which slots of the caches these positions of the sequence with this row of the block tables have."""
    return tl.load(table + position_S // BLOCK_SIZE) * BLOCK_SIZE + position_S % BLOCK_SIZE


@triton.jit
def attend(
    q_RD,
    limit_R,
    acc_RD,
    max_R,
    sum_R,
    k_cache,
    v_cache,
    table,
    head,
    start,
    stop,
    last,
    scale_log2,
    MASKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(acc, max, sum) after positions start to stop, in steps of S; row r attends to those below limit_R.

    Positions after `last` are not read: where a step goes beyond it, the last token is read again, and no value
    that nobody wrote meets a weight of zero. Without MASKED all rows attend to all positions.
    """
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, q_RD.shape[1])[None, :]
    slot_S = _slots(table, tl.minimum(start + s, last), BLOCK_SIZE)
    for first in range(start, stop, BLOCK_S):
        position = first + s
        row = (slot_S.to(tl.int64) * (KV_HEADS * D) + head * D)[:, None]
        # Looked up a step ahead: loads of keys that waited for it would be in flight half as long.
        slot_S = _slots(table, tl.minimum(position + BLOCK_S, last), BLOCK_SIZE)
        if q_RD.shape[1] == D:
            k_SD = tl.load(k_cache + row + d)
            v_SD = tl.load(v_cache + row + d)
        else:
            k_SD = tl.load(k_cache + row + d, mask=d < D, other=0.0)
            v_SD = tl.load(v_cache + row + d, mask=d < D, other=0.0)
        scores_RS = tl.dot(q_RD, tl.trans(k_SD), input_precision=PRECISION) * scale_log2
        if MASKED:
            scores_RS = tl.where(position[None, :] < limit_R[:, None], scores_RS, -float("inf"))
        new_max_R = tl.maximum(max_R, tl.max(scores_RS, axis=1))
        weights_RS = tl.exp2(scores_RS - new_max_R[:, None])
        shrink_R = tl.exp2(max_R - new_max_R)
        sum_R = sum_R * shrink_R + tl.sum(weights_RS, axis=1)
        acc_RD = acc_RD * shrink_R[:, None]
        acc_RD = tl.dot(weights_RS.to(v_SD.dtype), v_SD, acc_RD, input_precision=PRECISION)
        max_R = new_max_R
    return acc_RD, max_R, sum_R


def attention_sizes(
    num_heads: int, num_kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype
) -> dict[str, int | str]:
    """The constants that both kernels have."""
    return {
        "HEADS": num_heads,
        "KV_HEADS": num_kv_heads,
        "D": head_size,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "BLOCK_SIZE": block_size,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
