"""How weights and activations of each format enter a product: what every grouped kernel's inner loop shares."""

from __future__ import annotations

import triton
import triton.language as tl

# PLAIN: as they are. NATIVE: float8 times float8, activations with scales. BYTES: float8 weights that the kernel
# widens itself, for GPUs with no float8 (sm_80) and for tiles too small for it to pay.
PLAIN, NATIVE, BYTES = range(3)


@triton.jit
def widen(codes):
    """The float32 values of float8_e4m3fn bytes, by integer arithmetic; exact, subnormals included (no NaN)."""
    bits = codes.to(tl.uint32)
    magnitude = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where(bits >= 0x80, -magnitude, magnitude)


@triton.jit
def load_weights(
    w, row, rows_left, at, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MODE: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """[BN, BK] of a weight of K columns from (row, at) on; of its rows `rows_left` are wanted, past them is rubbish."""
    if TMA:
        return w.load([row, at])
    else:
        n = tl.minimum(tl.arange(0, BN), rows_left - 1)
        k = at + tl.arange(0, BK)
        place = w + row.to(tl.int64) * K + n[:, None] * K + k[None, :]
        if K % BK == 0:
            return tl.load(place)
        else:
            return tl.load(place, mask=(k < K)[None, :], other=0 if MODE == 2 else 0.0)


@triton.jit
def block_scale(scales, row, k, SCALE_K: tl.constexpr):
    """Each row's factor in the block of 128 columns that holds column k."""
    return tl.load(scales + row // 128 * SCALE_K + k // 128)


@triton.jit
def multiply_add(
    acc, w, x, w_scale, x_scale, MODE: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr
):
    """acc + x @ w^T of w [BN, BK], x [BM, BK]; acc is [BM, BN], or [BN, BM] where SWAP.

    Wide MMA instructions want at least 64 rows on the left: a tile of few tokens has them in its weights.
    """
    if MODE == 2:
        w = widen(w).to(x.dtype)
    # No early returns: Triton compiles what follows one in an `if`, too.
    if MODE == 0:
        if SWAP:  # noqa: SIM108 (on one line it is too long)
            acc = tl.dot(w, x.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    elif SWAP:
        part = tl.dot(w, x.T, input_precision=PRECISION) * w_scale[:, None]
        acc += part * x_scale[None, :] if MODE == 1 else part
    else:
        part = tl.dot(x, w.T, input_precision=PRECISION) * w_scale[None, :]
        acc += part * x_scale[:, None] if MODE == 1 else part
    return acc
