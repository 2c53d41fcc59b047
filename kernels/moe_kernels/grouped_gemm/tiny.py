"""About one row an expert: no sorting, two launches, every program finds its expert itself.

Shape legend: G tokens, K choices, H hidden, F intermediate. Each product is a matrix times one vector, summed in
float32 registers: bound by latency and by the weights' bytes, never by arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.grouped_gemm.weights import block_scale, widen


@triton.jit
def _part(w_at, v, scales, row, at, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MODE: tl.constexpr):
    """[BN, BK]: of rows of K weights those from column `at` on, times the vector's part `v` [BK]."""
    scale_k: tl.constexpr = (K + 127) // 128
    k = at + tl.arange(0, BK)
    w = tl.load(w_at + k[None, :], mask=(k < K)[None, :], other=0 if MODE == 2 else 0.0)
    if MODE == 0:
        part = w.to(tl.float32)
    elif BK <= 128:
        part = widen(w) * block_scale(scales, row, at, scale_k)[:, None]
    else:
        block = at // 128 + tl.arange(0, BK // 128)
        scale_at = scales + (row // 128 * scale_k)[:, None] + block[None, :]
        scale = tl.load(scale_at, mask=(block < scale_k)[None, :], other=0.0)
        part = (widen(w).reshape([BN, BK // 128, 128]) * scale[:, :, None]).reshape([BN, BK])
    return part * v[None, :]


@triton.jit
def gate_up_tiny(
    x,
    w,
    w_scale,
    ids,
    h,
    H: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    MODE: tl.constexpr,
):
    """h [G * K, F] by choice; one program for each (BN columns of F, choice).

    Gate and up are read in one loop: with few tokens there are few programs, and each has to ask for much at once.
    """
    choice = tl.program_id(1).to(tl.int64)
    expert = tl.load(ids + choice).to(tl.int64)
    if expert < 0:
        return
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_in = tl.minimum(n, F - 1)
    scales = w_scale + expert * ((2 * F + 127) // 128 * ((H + 127) // 128)) if MODE != 0 else w_scale
    w_at = w + expert * 2 * F * H + n_in[:, None] * H
    x_at = x + choice // TOP_K * H
    gate_part = tl.zeros([BN, BK], tl.float32)
    up_part = tl.zeros([BN, BK], tl.float32)
    # Without stages of its own the loop is not pipelined: Triton brings ahead only what a product takes.
    for at in tl.range(0, H, BK, num_stages=STAGES):
        k = at + tl.arange(0, BK)
        v = tl.load(x_at + k, mask=k < H, other=0.0).to(tl.float32)
        gate_part += _part(w_at, v, scales, n_in, at, H, BN, BK, MODE)
        up_part += _part(w_at + F * H, v, scales, n_in + F, at, H, BN, BK, MODE)
    gate, up = tl.sum(gate_part, 1), tl.sum(up_part, 1)
    out = gate / (1 + tl.exp(-gate)) * up
    tl.store(h + choice * F + n, out.to(h.dtype.element_ty), mask=n < F)


@triton.jit
def down_tiny(
    h,
    w,
    w_scale,
    ids,
    weights,
    y,
    H: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    MODE: tl.constexpr,
):
    """y [G, H]; one program for each (BN columns of H, token), over the token's choices in their order."""
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_in = tl.minimum(n, H - 1)
    acc = tl.zeros([BN], tl.float32)
    for i in range(TOP_K):
        choice = token * TOP_K + i
        expert = tl.load(ids + choice).to(tl.int64)
        if expert >= 0:
            scales = w_scale + expert * ((H + 127) // 128 * ((F + 127) // 128)) if MODE != 0 else w_scale
            w_at = w + expert * H * F + n_in[:, None] * F
            part = tl.zeros([BN, BK], tl.float32)
            for at in tl.range(0, F, BK, num_stages=STAGES):
                k = at + tl.arange(0, BK)
                v = tl.load(h + choice * F + k, mask=k < F, other=0.0).to(tl.float32)
                part += _part(w_at, v, scales, n_in, at, F, BN, BK, MODE)
            acc += tl.sum(part, 1) * tl.load(weights + choice).to(tl.float32)
    tl.store(y + token * H + n, acc.to(y.dtype.element_ty), mask=n < H)
