"""The Triton implementation of the causal convolution: a kernel for decodes, one for prefills."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.custom_op import custom_op
from moe_kernels.sequences import PREFILL_CHUNK, PackedSequences

DECODE_CHANNELS = 256  # of a program
PREFILL_CHANNELS = 64
PREFILL_TOKENS = 16  # at a time, so that no value leaves the registers


@triton.jit
def _last_inputs(
    x, x_stride, old, has_context, first, count, c, C: tl.constexpr, W: tl.constexpr, H: tl.constexpr
):
    """The W - 1 inputs before token first + count, [channels, H >= W - 1]; older ones come from slot `old`."""
    h = tl.arange(0, H)[None, :]
    in_CH = (c < C)[:, None] & (h < W - 1)
    position = count - (W - 1) + h
    at = x + (first + position).to(tl.int64) * x_stride + c[:, None]
    new_CH = tl.load(at, mask=in_CH & (position >= 0), other=0.0)
    from_old = in_CH & (position < 0) & has_context
    old_CH = tl.load(old + c[:, None] * (W - 1) + (W - 1) + position, mask=from_old, other=0.0)
    return tl.where(position < 0, old_CH, new_CH.to(old_CH.dtype))


@triton.jit
def _keep(state, slot, inputs_CH, c, C: tl.constexpr, W: tl.constexpr, H: tl.constexpr):
    h = tl.arange(0, H)[None, :]
    at = state + slot.to(tl.int64) * (C * (W - 1)) + c[:, None] * (W - 1) + h
    tl.store(at, inputs_CH, mask=(c < C)[:, None] & (h < W - 1))


@triton.jit
def decode_kernel(
    x,
    weight,
    state,
    slots,
    out,
    x_stride,
    C: tl.constexpr,
    W: tl.constexpr,
    H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (block of channels, sequence); sequence i is token i."""
    token = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_C = c < C
    slot = tl.load(slots + token).to(tl.int64)
    old = state + slot * (C * (W - 1))
    kept_CH = _last_inputs(x, x_stride, old, True, token, 1, c, C, W, H)
    total_C = tl.zeros((BLOCK_C,), tl.float32)
    for tap in tl.static_range(W):
        tap_C = tl.load(weight + c * W + tap, mask=in_C, other=0.0).to(tl.float32)
        if tap < W - 1:
            input_C = tl.load(old + c * (W - 1) + tap, mask=in_C, other=0.0)
        else:
            input_C = tl.load(x + token * x_stride + c, mask=in_C, other=0.0)
        total_C += input_C.to(tl.float32) * tap_C
    tl.store(out + token * C + c, (total_C * tl.sigmoid(total_C)).to(out.dtype.element_ty), mask=in_C)
    tl.debug_barrier()  # all threads have read the old inputs
    _keep(state, slot, kept_CH, c, C, W, H)


@triton.jit
def prefill_kernel(
    x,
    weight,
    state,
    slots,
    out,
    tiles,
    sequences,
    checkpoints,
    x_stride,
    C: tl.constexpr,
    W: tl.constexpr,
    H: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (block of channels, tile), BLOCK_T tokens at a time.

    A sequence's first tile alone reads its slot, and so may write it.
    """
    tile = tiles + tl.program_id(1) * 2
    sequence = sequences + tl.load(tile) * 8
    offset = tl.load(tile + 1)
    slot = tl.load(slots + tl.load(sequence)).to(tl.int64)
    has_context = tl.load(sequence + 1) > 0
    first = tl.load(sequence + 2)
    count = tl.load(sequence + 3)
    old = state + slot * (C * (W - 1))
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_C = (c < C)[None, :]
    for start in range(0, TILE, BLOCK_T):
        t = offset + start + tl.arange(0, BLOCK_T)
        in_T = (t < count)[:, None]
        total_TC = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for tap in tl.static_range(W):
            position = (t + tap - (W - 1))[:, None]
            at = x + (first + position).to(tl.int64) * x_stride + c[None, :]
            input_TC = tl.load(at, mask=in_C & in_T & (position >= 0), other=0.0).to(tl.float32)
            if tap < W - 1:
                in_old = in_C & in_T & (position < 0) & has_context
                at = old + c[None, :] * (W - 1) + (W - 1) + position
                input_TC += tl.load(at, mask=in_old, other=0.0).to(tl.float32)
            tap_C = tl.load(weight + c * W + tap, mask=c < C, other=0.0).to(tl.float32)
            total_TC += input_TC * tap_C[None, :]
        at_out = out + (first + t).to(tl.int64)[:, None] * C + c[None, :]
        tl.store(at_out, (total_TC * tl.sigmoid(total_TC)).to(out.dtype.element_ty), mask=in_C & in_T)

    if offset == 0:
        for point in range(tl.load(sequence + 6), tl.load(sequence + 7)):
            num_tokens = tl.load(checkpoints + point * 2)
            kept_CH = _last_inputs(x, x_stride, old, has_context, first, num_tokens, c, C, W, H)
            _keep(state, tl.load(checkpoints + point * 2 + 1), kept_CH, c, C, W, H)
        kept_CH = _last_inputs(x, x_stride, old, has_context, first, count, c, C, W, H)
        tl.debug_barrier()  # all threads have read the old inputs
        _keep(state, slot, kept_CH, c, C, W, H)


def causal_conv1d(
    x_TC: torch.Tensor,
    weight_CW: torch.Tensor,
    conv_state: torch.Tensor,
    state_slots_B: torch.Tensor,
    sequences: PackedSequences,
) -> torch.Tensor:
    """See `moe_kernels.conv.causal_conv1d`; float32, bfloat16 and float16, at most 64 taps."""
    tables = sequences.prefill_tables
    return _causal_conv1d(
        x_TC,
        weight_CW,
        conv_state,
        state_slots_B,
        sequences.num_decodes,
        None if tables is None else tables.tiles_L2,
        None if tables is None else tables.sequences_S8,
        None if tables is None else tables.checkpoints_P2,
    )


def _empty_out(x, weight, state, slots, num_decodes, tiles, sequences, checkpoints):
    return x.new_empty(x.shape)


@custom_op(
    "causal_conv1d(Tensor x, Tensor weight, Tensor(a!) state, Tensor slots, int num_decodes, Tensor? tiles, "
    "Tensor? sequences, Tensor? checkpoints) -> Tensor",
    fake=_empty_out,
)
def _causal_conv1d(
    x_TC: torch.Tensor,
    weight_CW: torch.Tensor,
    state: torch.Tensor,
    slots_B: torch.Tensor,
    num_decodes: int,
    tiles_L2: torch.Tensor | None,
    sequences_S8: torch.Tensor | None,
    checkpoints_P2: torch.Tensor | None,
) -> torch.Tensor:
    out_TC = x_TC.new_empty(x_TC.shape)
    if x_TC.stride(1) != 1:
        x_TC = x_TC.contiguous()
    tensors = (x_TC, weight_CW.contiguous(), state, slots_B, out_TC)
    sizes = conv_sizes(*weight_CW.shape)
    channels = weight_CW.shape[0]
    if num_decodes:
        grid = (triton.cdiv(channels, DECODE_CHANNELS), num_decodes)
        decode_kernel[grid](*tensors, x_TC.stride(0), **sizes, BLOCK_C=DECODE_CHANNELS)
    if tiles_L2 is not None:
        grid = (triton.cdiv(channels, PREFILL_CHANNELS), tiles_L2.shape[0])
        prefill_kernel[grid](
            *tensors,
            tiles_L2,
            sequences_S8,
            checkpoints_P2,
            x_TC.stride(0),
            **sizes,
            TILE=PREFILL_CHUNK,
            BLOCK_T=PREFILL_TOKENS,
            BLOCK_C=PREFILL_CHANNELS,
        )
    return out_TC


def conv_sizes(channels: int, width: int) -> dict[str, int]:
    """The constants that both kernels have."""
    return {"C": channels, "W": width, "H": triton.next_power_of_2(max(width - 1, 1))}
