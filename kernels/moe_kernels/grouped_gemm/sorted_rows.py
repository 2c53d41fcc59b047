"""Grouped products of tiles of sorted rows: gate-up with SiLU, down with the routing weight, sum per token.

A program takes items (a tile, a block of columns), the blocks of a tile before the next tile: a tile's rows are read
from memory once, and an expert's weights stay in the L2 cache from its first tile to its last. As many programs as
there can be items make it a plain launch, for decodes; as many as the GPU runs at once make it persistent, for
prefills.

Shape legend: M = G * K choices, row = place in the order by expert, BM x BN x BK a tile.
A tile's rows past its expert's end, and a block's columns past the weight's, are computed and not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_kernels.grouped_gemm.weights import block_scale, load_weights, multiply_add


@triton.jit
def _tile(offsets, tiles, bound, tile, BM: tl.constexpr):
    """A tile's expert, its rows, and which of them it has."""
    expert = tl.load(tiles + tile)
    row = tl.load(tiles + bound + tile) + tl.arange(0, BM)
    return expert, row, row < tl.load(offsets + expert + 1)


@triton.jit(do_not_specialize=["bound"])
def gate_up(
    x,
    x_scale,
    w,
    w_scale,
    choices,
    offsets,
    tiles,
    h,
    bound,
    H: tl.constexpr,
    F: tl.constexpr,
    TOP_K: tl.constexpr,
    L: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    MODE: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h [M, F] by row: silu(gate) * up. `w` is a descriptor of [L * 2F, H] where TMA, else a pointer."""
    blocks: tl.constexpr = (F + BN - 1) // BN
    scale_k: tl.constexpr = (H + 127) // 128
    scale_n: tl.constexpr = (2 * F + 127) // 128
    k = tl.arange(0, BK)
    num_items = tl.load(offsets + L + 1) * blocks
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        expert, row, live = _tile(offsets, tiles, bound, item // blocks, BM)
        token = (tl.load(choices + row, mask=live, other=0) // TOP_K).to(tl.int64)
        first = item % blocks * BN
        n = first + tl.arange(0, BN)
        n_in = tl.minimum(n, F - 1)
        scales = w_scale + expert * (scale_n * scale_k) if MODE != 0 else w_scale
        x_at = x + token[:, None] * H + k[None, :]
        gate_row = expert * (2 * F) + first
        gate = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
        up = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
        for at in tl.range(0, H, BK, warp_specialize=SPECIALIZE):
            x_tile = tl.load(x_at + at, mask=(at + k < H)[None, :] & live[:, None], other=0.0)
            gate_w = load_weights(w, gate_row, F - first, at, H, BN, BK, MODE, TMA)
            up_w = load_weights(w, gate_row + F, F - first, at, H, BN, BK, MODE, TMA)
            gate_s = block_scale(scales, n_in, at, scale_k) if MODE != 0 else 0.0
            up_s = block_scale(scales, n_in + F, at, scale_k) if MODE != 0 else 0.0
            x_s = tl.load(x_scale + token * scale_k + at // 128, mask=live, other=0.0) if MODE == 1 else 0.0
            gate = multiply_add(gate, gate_w, x_tile, gate_s, x_s, MODE, SWAP, PRECISION)
            up = multiply_add(up, up_w, x_tile, up_s, x_s, MODE, SWAP, PRECISION)
        out = gate / (1 + tl.exp(-gate)) * up
        if SWAP:
            out = out.T
        h_at = h + row.to(tl.int64)[:, None] * F + n[None, :]
        tl.store(h_at, out.to(h.dtype.element_ty), mask=live[:, None] & (n < F)[None, :])


@triton.jit(do_not_specialize=["bound"])
def down(
    h,
    h_scale,
    w,
    w_scale,
    weights,
    choices,
    offsets,
    tiles,
    y,
    bound,
    H: tl.constexpr,
    F: tl.constexpr,
    L: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    MODE: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y [M, H] by choice: the expert's result times the choice's weight. `w` is as `gate_up`'s, of [L * H, F]."""
    blocks: tl.constexpr = (H + BN - 1) // BN
    scale_k: tl.constexpr = (F + 127) // 128
    scale_n: tl.constexpr = (H + 127) // 128
    k = tl.arange(0, BK)
    num_items = tl.load(offsets + L + 1) * blocks
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        expert, row, live = _tile(offsets, tiles, bound, item // blocks, BM)
        choice = tl.load(choices + row, mask=live, other=0).to(tl.int64)
        row = row.to(tl.int64)
        first = item % blocks * BN
        n = first + tl.arange(0, BN)
        n_in = tl.minimum(n, H - 1)
        scales = w_scale + expert * (scale_n * scale_k) if MODE != 0 else w_scale
        h_at = h + row[:, None] * F + k[None, :]
        acc = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
        for at in tl.range(0, F, BK, warp_specialize=SPECIALIZE):
            h_tile = tl.load(h_at + at, mask=(at + k < F)[None, :] & live[:, None], other=0.0)
            w_tile = load_weights(w, expert * H + first, H - first, at, F, BN, BK, MODE, TMA)
            w_s = block_scale(scales, n_in, at, scale_k) if MODE != 0 else 0.0
            h_s = tl.load(h_scale + row * scale_k + at // 128, mask=live, other=0.0) if MODE == 1 else 0.0
            acc = multiply_add(acc, w_tile, h_tile, w_s, h_s, MODE, SWAP, PRECISION)
        if SWAP:
            acc = acc.T
        acc *= tl.load(weights + choice, mask=live, other=0.0).to(tl.float32)[:, None]
        y_at = y + choice[:, None] * H + n[None, :]
        tl.store(y_at, acc.to(y.dtype.element_ty), mask=live[:, None] & (n < H)[None, :])


@triton.jit
def sum_choices(rows, ids, y, H: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """y [G, H]: the rows of each token's local choices, added in the choices' order."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(TOP_K):
        local = tl.load(ids + token * TOP_K + i) >= 0
        row = rows + (token * TOP_K + i) * H + n
        acc += tl.load(row, mask=local & (n < H), other=0.0).to(tl.float32)
    tl.store(y + token * H + n, acc.to(y.dtype.element_ty), mask=n < H)
