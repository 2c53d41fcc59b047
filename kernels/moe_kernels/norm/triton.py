"""The Triton implementation of the norms, the rotary positions and SiLU-and-multiply: one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.custom_op import custom_op

ROW_VALUES = 2048  # that a program of a norm takes at least: several small rows, or one
ROTARY_HEADS = 4  # of a program
SILU_BLOCK = 512


@triton.jit
def _normalized_rows(
    x, rows_R, num_rows, inner, outer_stride, inner_stride, eps, H: tl.constexpr, B: tl.constexpr
):
    """x / sqrt(mean(x^2) + eps) of these rows in float32, [rows, B >= H]."""
    columns = tl.arange(0, B)[None, :]
    at_R = (rows_R // inner).to(tl.int64) * outer_stride + (rows_R % inner) * inner_stride
    inside = (rows_R < num_rows)[:, None] & (columns < H)
    x_RH = tl.load(x + at_R[:, None] + columns, mask=inside, other=0.0).to(tl.float32)
    return x_RH * tl.rsqrt(tl.sum(x_RH * x_RH, axis=1) / H + eps)[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x,
    weight,
    out,
    num_rows,
    inner,
    outer_stride,
    inner_stride,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
):
    """Program: ROWS rows of H values; row r of x stands at (r // inner, r % inner)."""
    rows_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    x_RH = _normalized_rows(x, rows_R, num_rows, inner, outer_stride, inner_stride, eps, H, BLOCK)
    scale_H = tl.load(weight + columns, mask=columns < H, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        scale_H += 1.0
    inside = (rows_R < num_rows)[:, None] & (columns < H)[None, :]
    at = rows_R.to(tl.int64)[:, None] * H + columns[None, :]
    tl.store(out + at, (x_RH * scale_H[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_gated_kernel(
    x,
    gate,
    weight,
    out,
    num_rows,
    inner,
    x_outer_stride,
    x_inner_stride,
    gate_outer_stride,
    gate_inner_stride,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program: ROWS rows of H values."""
    rows_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    x_RH = _normalized_rows(x, rows_R, num_rows, inner, x_outer_stride, x_inner_stride, eps, H, BLOCK)
    weight_H = tl.load(weight + columns, mask=columns < H, other=0.0).to(tl.float32)
    # The two roundings that the model was trained with.
    scaled_RH = (x_RH.to(x.dtype.element_ty).to(tl.float32) * weight_H[None, :]).to(x.dtype.element_ty)
    inside = (rows_R < num_rows)[:, None] & (columns < H)[None, :]
    at_R = (rows_R // inner).to(tl.int64) * gate_outer_stride + (rows_R % inner) * gate_inner_stride
    gate_RH = tl.load(gate + at_R[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    out_RH = scaled_RH.to(tl.float32) * (gate_RH * tl.sigmoid(gate_RH))
    at = rows_R.to(tl.int64)[:, None] * H + columns[None, :]
    tl.store(out + at, out_RH.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn_heads(
    x, out, cos, sin, block, token, x_token_stride, x_head_stride, N: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    heads = block * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    cos_R = tl.load(cos + token * R + i, mask=i < R // 2, other=0.0).to(tl.float32)[None, :]
    sin_R = tl.load(sin + token * R + i, mask=i < R // 2, other=0.0).to(tl.float32)[None, :]
    at_x = x + token * x_token_stride + heads[:, None] * x_head_stride
    at_out = out + token * (N * D) + heads[:, None] * D
    inside = (heads < N)[:, None] & (i < R // 2)[None, :]
    first = tl.load(at_x + i[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at_x + R // 2 + i[None, :], mask=inside, other=0.0).to(tl.float32)
    turned = first * cos_R - second * sin_R
    tl.store(at_out + i[None, :], turned.to(out.dtype.element_ty), mask=inside)
    turned = second * cos_R + first * sin_R
    tl.store(at_out + R // 2 + i[None, :], turned.to(out.dtype.element_ty), mask=inside)
    if R < D:
        rest = R + tl.arange(0, REST)[None, :]
        inside = (heads < N)[:, None] & (rest < D)
        tl.store(at_out + rest, tl.load(at_x + rest, mask=inside, other=0.0), mask=inside)


@triton.jit
def rotary_kernel(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    N: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Program (token, block of q's heads and then of k's); `cos` and `sin` repeat their first half."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (N + HEADS - 1) // HEADS
    if block < q_blocks:
        _turn_heads(
            q, q_out, cos, sin, block, token, q_token_stride, q_head_stride, N, D, R, HALF, REST, HEADS
        )
    else:
        block -= q_blocks
        _turn_heads(
            k, k_out, cos, sin, block, token, k_token_stride, k_head_stride, M, D, R, HALF, REST, HEADS
        )


@triton.jit
def silu_and_mul_kernel(gate_up, out, row_stride, F: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * row_stride + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + F + f, mask=f < F, other=0.0).to(tl.float32)
    tl.store(out + row * F + f, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=f < F)


def _empty_norm(x, weight, eps, zero_centered):
    return x.new_empty(x.shape)


@custom_op("rms_norm(Tensor x, Tensor weight, float eps, bool zero_centered) -> Tensor", fake=_empty_norm)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool) -> torch.Tensor:
    """See `moe_kernels.norm.rms_norm`."""
    out = x.new_empty(x.shape)
    if not x.numel():
        return out
    x, inner, strides = _rows(x)
    sizes = norm_sizes(x.shape[-1])
    num_rows = x.numel() // x.shape[-1]
    rms_norm_kernel[(triton.cdiv(num_rows, sizes["ROWS"]),)](
        x, weight, out, num_rows, inner, *strides, eps, **sizes, ZERO_CENTERED=zero_centered
    )
    return out


def _empty_gated(x, gate, weight, eps):
    return x.new_empty(x.shape)


@custom_op("rms_norm_gated(Tensor x, Tensor gate, Tensor weight, float eps) -> Tensor", fake=_empty_gated)
def rms_norm_gated(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `moe_kernels.norm.rms_norm_gated`."""
    out = x.new_empty(x.shape)
    if not x.numel():
        return out
    (x, inner, x_strides), (gate, _, gate_strides) = _rows(x), _rows(gate)
    sizes = norm_sizes(x.shape[-1])
    num_rows = x.numel() // x.shape[-1]
    rms_norm_gated_kernel[(triton.cdiv(num_rows, sizes["ROWS"]),)](
        x, gate, weight, out, num_rows, inner, *x_strides, *gate_strides, eps, **sizes
    )
    return out


def _empty_rotary(q, k, cos, sin):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@custom_op("apply_rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)", fake=_empty_rotary)
def apply_rotary(
    q_TND: torch.Tensor, k_TMD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `moe_kernels.norm.apply_rotary`."""
    out = q_TND.new_empty(q_TND.shape), k_TMD.new_empty(k_TMD.shape)
    if not q_TND.shape[0]:
        return out
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q_TND, k_TMD))
    sizes = rotary_sizes(q.shape[1], k.shape[1], q.shape[2], cos_TR.shape[1])
    blocks = sum(triton.cdiv(x.shape[1], ROTARY_HEADS) for x in (q, k))
    rotary_kernel[(q.shape[0], blocks)](
        q, k, cos_TR.contiguous(), sin_TR.contiguous(), *out, *q.stride()[:2], *k.stride()[:2], **sizes
    )
    return out


def _empty_half(gate_up):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@custom_op("silu_and_mul(Tensor gate_up) -> Tensor", fake=_empty_half)
def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `moe_kernels.norm.silu_and_mul`; computed in float32 and rounded once."""
    out = _empty_half(gate_up)
    if not out.numel():
        return out
    width = out.shape[-1]
    rows = gate_up.reshape(-1, 2 * width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    block = min(SILU_BLOCK, triton.next_power_of_2(width))
    silu_and_mul_kernel[(rows.shape[0], triton.cdiv(width, block))](
        rows, out, rows.stride(0), F=width, BLOCK=block
    )
    return out


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, tuple[int, int]]:
    """(x, rows in its last but one dimension, strides of both): two dimensions reach every row of a slice."""
    if x.dim() > 3 or x.stride(-1) != 1:
        x = x.contiguous().view(-1, x.shape[-1])
    if x.dim() == 3:
        return x, x.shape[1], (x.stride(0), x.stride(1))
    return x, 1, (x.stride(0) if x.dim() == 2 else 0, 0)


def norm_sizes(size: int) -> dict[str, int]:
    """The constants that both norms have for rows of this size."""
    block = triton.next_power_of_2(size)
    rows = max(1, ROW_VALUES // block)
    return {"H": size, "BLOCK": block, "ROWS": min(rows, 16), "num_warps": 4 if block <= 4096 else 8}


def rotary_sizes(num_heads: int, num_key_heads: int, head_size: int, rotary_size: int) -> dict[str, int]:
    """The constants of `rotary_kernel`."""
    return {
        "N": num_heads,
        "M": num_key_heads,
        "D": head_size,
        "R": rotary_size,
        "HALF": triton.next_power_of_2(rotary_size // 2),
        "REST": triton.next_power_of_2(max(head_size - rotary_size, 1)),
        "HEADS": ROTARY_HEADS,
    }
