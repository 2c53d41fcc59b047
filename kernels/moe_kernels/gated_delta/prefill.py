"""The Triton kernels for prefills: chunks prepared in parallel, then one pass over them with the state.

Within a chunk with running decay g, the updates u solve (I + A) u = beta (v - exp(g) k S), where A_ij =
beta_i exp(g_i - g_j) k_i . k_j below the diagonal and S is the state at the chunk's start. `prepare_kernel`
finds X = (I + A)^-1 and from it what does not depend on S: U = X beta v and W = X beta exp(g) k (u = U - W S)
and the scores exp(g_i - g_j) q_i . k_j. `scan_kernel` carries S from chunk to chunk and writes the outputs.
q and k stay as they came in the products, and their L2 norms are factors of rows: no rounding is added.
Source: Gated Delta Networks (arXiv:2412.06464), section 3.3.

Shape legend: T tokens, N value heads, D key size, V value size, C tokens of a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.gated_delta.launch import GatedDeltaLaunch
from moe_kernels.sequences import PREFILL_CHUNK


@triton.jit
def _unit_lower_inverse(a_CC, C: tl.constexpr):
    """(I + a)^-1 for a strictly lower triangular `a`, all in float32: halves row by row, then their product.

    Powers of `a` (the Neumann series) would need no rows, but grow to 1e18 for equal keys.
    """
    B: tl.constexpr = C // 2
    row = tl.arange(0, B)
    half = tl.arange(0, 2)
    i_half, j_half = half[:, None, None, None], half[None, None, :, None]
    a_2B2B = tl.reshape(a_CC, (2, B, 2, B))
    a_2BB = tl.sum(tl.where(i_half == j_half, a_2B2B, 0.0), axis=2)
    x_2BB = tl.zeros((2, B, B), tl.float32) + tl.where(row[:, None] == row[None, :], 1.0, 0.0)[None]
    for i in range(1, B):
        is_row = (row == i)[None, :, None]
        a_2B = tl.sum(tl.where(is_row, a_2BB, 0.0), axis=1)
        x_2BB -= tl.where(is_row, tl.sum(a_2B[:, :, None] * x_2BB, axis=1)[:, None, :], 0.0)

    is_first = half[:, None, None] == 0
    first_BB = tl.sum(tl.where(is_first, x_2BB, 0.0), axis=0)
    second_BB = tl.sum(tl.where(is_first, 0.0, x_2BB), axis=0)
    left_BB = tl.sum(tl.sum(tl.where(i_half > j_half, a_2B2B, 0.0), axis=2), axis=0)
    corner_BB = tl.dot(left_BB, first_BB, input_precision="ieee")
    corner_BB = -tl.dot(second_BB, corner_BB, input_precision="ieee")
    x_2B2B = tl.where(i_half == j_half, x_2BB[:, :, None, :], 0.0)
    x_2B2B = tl.where(i_half > j_half, corner_BB[None, :, None, :], x_2B2B)
    return tl.reshape(x_2B2B, (C, C))


@triton.jit(do_not_specialize=["num_tokens"])
def prepare_kernel(
    q,
    k,
    v,
    decay,
    beta,
    chunks,
    w,
    u,
    scores,
    factors,
    num_tokens,
    q_stride,
    k_stride,
    v_stride,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (chunk, value head); BLOCK columns of q, k and v at a time.

    Writes w [T, N, D], u [T, N, V] and scores [chunks, N, C, C] in q's dtype, and factors [3, T, N] float32:
    what multiplies each row of q for the old state and of k for the new one, and the running decay.
    """
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    key_head = head // (VALUE_HEADS // KEY_HEADS)
    i_C = tl.arange(0, C)
    size = tl.load(chunks + chunk * 3 + 1)
    tokens = (tl.load(chunks + chunk * 3) + i_C).to(tl.int64)
    inside = i_C < size
    in_heads = tokens * VALUE_HEADS + head

    q_k_CC = tl.zeros((C, C), tl.float32)
    k_k_CC = tl.zeros((C, C), tl.float32)
    q_q_C = tl.zeros((C,), tl.float32)
    k_k_C = tl.zeros((C,), tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        in_CD = inside[:, None] & (d < D)[None, :]
        q_CD = tl.load(q + tokens[:, None] * q_stride + key_head * D + d[None, :], mask=in_CD, other=0.0)
        k_CD = tl.load(k + tokens[:, None] * k_stride + key_head * D + d[None, :], mask=in_CD, other=0.0)
        q_f32, k_f32 = q_CD.to(tl.float32), k_CD.to(tl.float32)
        q_q_C += tl.sum(q_f32 * q_f32, axis=1)
        k_k_C += tl.sum(k_f32 * k_f32, axis=1)
        q_k_CC = tl.dot(q_CD, tl.trans(k_CD), q_k_CC, input_precision=PRECISION)
        k_k_CC = tl.dot(k_CD, tl.trans(k_CD), k_k_CC, input_precision=PRECISION)
    q_norm_C = tl.rsqrt(q_q_C + 1e-6) * (D**-0.5)
    k_norm_C = tl.rsqrt(k_k_C + 1e-6)
    beta_C = tl.load(beta + in_heads, mask=inside, other=0.0).to(tl.float32)
    g_C = tl.cumsum(tl.load(decay + in_heads, mask=inside, other=0.0).to(tl.float32), axis=0)

    # Masked before exp: above the diagonal the difference is positive and may overflow.
    causal_CC = i_C[:, None] >= i_C[None, :]
    pair_CC = tl.exp(tl.where(causal_CC, g_C[:, None] - g_C[None, :], -float("inf"))) * k_norm_C[None, :]
    scores_CC = q_k_CC * pair_CC * q_norm_C[:, None]
    at = scores + (chunk * VALUE_HEADS + head) * (C * C) + i_C[:, None] * C + i_C[None, :]
    tl.store(at, scores_CC.to(scores.dtype.element_ty))

    a_CC = k_k_CC * pair_CC * (beta_C * k_norm_C)[:, None]
    a_CC = tl.where(i_C[:, None] > i_C[None, :], a_CC, 0.0)
    x_CC = _unit_lower_inverse(a_CC, C)

    from_start_C = tl.exp(g_C)
    x_k_CC = (x_CC * (beta_C * from_start_C * k_norm_C)[None, :]).to(k.dtype.element_ty)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        in_CD = inside[:, None] & (d < D)[None, :]
        k_CD = tl.load(k + tokens[:, None] * k_stride + key_head * D + d[None, :], mask=in_CD, other=0.0)
        w_CD = tl.dot(x_k_CC, k_CD, input_precision=PRECISION)
        tl.store(w + in_heads[:, None] * D + d[None, :], w_CD.to(w.dtype.element_ty), mask=in_CD)
    x_v_CC = (x_CC * beta_C[None, :]).to(v.dtype.element_ty)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        in_CV = inside[:, None] & (columns < V)[None, :]
        v_CV = tl.load(v + tokens[:, None] * v_stride + head * V + columns[None, :], mask=in_CV, other=0.0)
        u_CV = tl.dot(x_v_CC, v_CV, input_precision=PRECISION)
        tl.store(u + in_heads[:, None] * V + columns[None, :], u_CV.to(u.dtype.element_ty), mask=in_CV)

    g_end = tl.sum(tl.where(i_C == size - 1, g_C, 0.0))
    factors_size = num_tokens.to(tl.int64) * VALUE_HEADS
    tl.store(factors + in_heads, q_norm_C * from_start_C, mask=inside)
    tl.store(factors + factors_size + in_heads, k_norm_C * tl.exp(g_end - g_C), mask=inside)
    tl.store(factors + 2 * factors_size + in_heads, g_C, mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def scan_kernel(
    q,
    k,
    w,
    u,
    scores,
    factors,
    chunks,
    sequences,
    state,
    slots,
    out,
    num_tokens,
    q_stride,
    k_stride,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (block of V, value head, sequence): its part of the state from the first chunk to the last."""
    head = tl.program_id(1)
    sequence = sequences + tl.program_id(2) * 8
    key_head = head // (VALUE_HEADS // KEY_HEADS)
    i_C = tl.arange(0, C)
    d = tl.arange(0, BLOCK_D)
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_state = (d < D)[:, None] & (columns < V)[None, :]
    in_slot = head * (D * V) + d[:, None] * V + columns[None, :]
    slot = tl.load(slots + tl.load(sequence)).to(tl.int64)
    own_state = state + slot * (VALUE_HEADS * D * V)
    has_context = tl.load(sequence + 1) > 0
    state_DV = tl.load(own_state + in_slot, mask=in_state & has_context, other=0.0).to(tl.float32)
    factors_size = num_tokens.to(tl.int64) * VALUE_HEADS

    for chunk in range(tl.load(sequence + 4), tl.load(sequence + 5)):
        first = tl.load(chunks + chunk * 3)
        size = tl.load(chunks + chunk * 3 + 1)
        tokens = (first + i_C).to(tl.int64)
        inside = i_C < size
        in_CD = inside[:, None] & (d < D)[None, :]
        in_CV = inside[:, None] & (columns < V)[None, :]
        in_heads = tokens * VALUE_HEADS + head

        w_CD = tl.load(w + in_heads[:, None] * D + d[None, :], mask=in_CD, other=0.0)
        u_CV = tl.load(u + in_heads[:, None] * V + columns[None, :], mask=in_CV, other=0.0)
        old_DV = state_DV.to(w_CD.dtype)
        u_CV = u_CV.to(tl.float32) - tl.dot(w_CD, old_DV, input_precision=PRECISION)

        q_CD = tl.load(q + tokens[:, None] * q_stride + key_head * D + d[None, :], mask=in_CD, other=0.0)
        q_factor_C = tl.load(factors + in_heads, mask=inside, other=0.0)
        out_CV = tl.dot(q_CD, old_DV, input_precision=PRECISION) * q_factor_C[:, None]
        chunk_scores = scores + (tl.cast(chunk, tl.int64) * VALUE_HEADS + head) * (C * C)
        scores_CC = tl.load(chunk_scores + i_C[:, None] * C + i_C[None, :])
        out_CV = tl.dot(scores_CC, u_CV.to(w_CD.dtype), out_CV, input_precision=PRECISION)
        tl.store(out + in_heads[:, None] * V + columns[None, :], out_CV.to(out.dtype.element_ty), mask=in_CV)

        k_CD = tl.load(k + tokens[:, None] * k_stride + key_head * D + d[None, :], mask=in_CD, other=0.0)
        k_factor_C = tl.load(factors + factors_size + in_heads, mask=inside, other=0.0)
        last = (first + size - 1).to(tl.int64) * VALUE_HEADS + head
        state_DV *= tl.exp(tl.load(factors + 2 * factors_size + last))
        to_end_CV = (u_CV * k_factor_C[:, None]).to(k_CD.dtype)
        state_DV = tl.dot(tl.trans(k_CD), to_end_CV, state_DV, input_precision=PRECISION)
        checkpoint = tl.load(chunks + chunk * 3 + 2)
        if checkpoint >= 0:
            kept = state + checkpoint.to(tl.int64) * (VALUE_HEADS * D * V)
            tl.store(kept + in_slot, state_DV.to(state.dtype.element_ty), mask=in_state)
    tl.store(own_state + in_slot, state_DV.to(state.dtype.element_ty), mask=in_state)


def prefill(
    q_TND: torch.Tensor,
    k_TND: torch.Tensor,
    v_TNV: torch.Tensor,
    decay_TN: torch.Tensor,
    beta_TN: torch.Tensor,
    state: torch.Tensor,
    slots_B: torch.Tensor,
    chunks_C3: torch.Tensor,
    sequences_S8: torch.Tensor,
    out_TNV: torch.Tensor,
    launch: GatedDeltaLaunch,
) -> None:
    """Fill the prefills' rows of out, and update their slots and checkpoints; heads are contiguous."""
    (tokens, heads, value_size), key_size, chunk = v_TNV.shape, k_TND.shape[2], PREFILL_CHUNK
    w = q_TND.new_empty(tokens, heads, key_size)
    u = q_TND.new_empty(tokens, heads, value_size)
    scores = q_TND.new_empty(chunks_C3.shape[0], heads, chunk, chunk)
    factors = torch.empty(3, tokens, heads, dtype=torch.float32, device=q_TND.device)
    sizes = prefill_sizes(k_TND.shape[1], heads, key_size, value_size, q_TND.dtype)
    q_stride, k_stride, v_stride = (x.stride(0) for x in (q_TND, k_TND, v_TNV))
    block_v = padded_block(launch.scan_block_v, value_size)

    inputs = (q_TND, k_TND, v_TNV, decay_TN, beta_TN, chunks_C3)
    prepare_kernel[(chunks_C3.shape[0], heads)](
        *inputs,
        w,
        u,
        scores,
        factors,
        tokens,
        q_stride,
        k_stride,
        v_stride,
        **sizes,
        BLOCK=launch.prepare_block,
        num_warps=launch.prepare_warps,
        num_stages=launch.prepare_stages,
    )
    scan_kernel[(triton.cdiv(value_size, block_v), heads, sequences_S8.shape[0])](
        q_TND,
        k_TND,
        w,
        u,
        scores,
        factors,
        chunks_C3,
        sequences_S8,
        state,
        slots_B,
        out_TNV,
        tokens,
        q_stride,
        k_stride,
        **sizes,
        BLOCK_D=max(16, triton.next_power_of_2(key_size)),
        BLOCK_V=block_v,
        num_warps=launch.scan_warps,
        num_stages=launch.scan_stages,
    )


def padded_block(block: int, size: int) -> int:
    """At most `block`, a power of two that a product takes."""
    return max(16, min(block, triton.next_power_of_2(size)))


def prefill_sizes(
    key_heads: int, value_heads: int, key_size: int, value_size: int, dtype: torch.dtype
) -> dict[str, int | str]:
    """The constants that both kernels have."""
    return {
        "KEY_HEADS": key_heads,
        "VALUE_HEADS": value_heads,
        "D": key_size,
        "V": value_size,
        "C": PREFILL_CHUNK,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
