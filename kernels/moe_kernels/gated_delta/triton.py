"""The Triton implementation of the gated delta rule and its gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.custom_op import custom_op
from moe_kernels.gated_delta.decode import decode
from moe_kernels.gated_delta.launch import GatedDeltaLaunch, default_launch
from moe_kernels.gated_delta.prefill import prefill
from moe_kernels.sequences import PackedSequences

GATES_BLOCK = 256


def gated_delta_rule(
    q_TND: torch.Tensor,
    k_TND: torch.Tensor,
    v_TNV: torch.Tensor,
    decay_TN: torch.Tensor,
    beta_TN: torch.Tensor,
    state: torch.Tensor,
    state_slots_B: torch.Tensor,
    sequences: PackedSequences,
    *,
    launch: GatedDeltaLaunch | None = None,
) -> torch.Tensor:
    """See `moe_kernels.gated_delta.gated_delta_rule`; float32, bfloat16 and float16."""
    tables = sequences.prefill_tables
    return _gated_delta_rule(
        q_TND,
        k_TND,
        v_TNV,
        decay_TN,
        beta_TN,
        state,
        state_slots_B,
        sequences.num_decodes,
        None if tables is None else tables.chunks_C3,
        None if tables is None else tables.sequences_S8,
        (launch or default_launch(v_TNV.dtype)).to_list(),
    )


def decode_step(
    q_BND: torch.Tensor,
    k_BND: torch.Tensor,
    v_BNV: torch.Tensor,
    decay_BN: torch.Tensor,
    beta_BN: torch.Tensor,
    state: torch.Tensor,
    slots_B: torch.Tensor,
    launch: GatedDeltaLaunch | None,
) -> torch.Tensor:
    """out_BNV of one token of each of the first B sequences; updates their slots."""
    values = (launch or default_launch(v_BNV.dtype)).to_list()
    inputs = (q_BND, k_BND, v_BNV, decay_BN, beta_BN)
    return _gated_delta_rule(*inputs, state, slots_B, v_BNV.shape[0], None, None, values)


def _empty_out(q, k, v, decay, beta, state, slots, num_decodes, chunks, sequences, launch):
    return v.new_empty(v.shape)


@custom_op(
    "gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor beta, Tensor(a!) state, Tensor slots, "
    "int num_decodes, Tensor? chunks, Tensor? sequences, int[] launch) -> Tensor",
    fake=_empty_out,
)
def _gated_delta_rule(
    q_TND: torch.Tensor,
    k_TND: torch.Tensor,
    v_TNV: torch.Tensor,
    decay_TN: torch.Tensor,
    beta_TN: torch.Tensor,
    state: torch.Tensor,
    slots_B: torch.Tensor,
    num_decodes: int,
    chunks_C3: torch.Tensor | None,
    sequences_S8: torch.Tensor | None,
    launch: list[int],
) -> torch.Tensor:
    out_TNV = v_TNV.new_empty(v_TNV.shape)
    q, k, v = (_with_whole_rows(x) for x in (q_TND, k_TND, v_TNV))
    inputs = (q, k, v, decay_TN.contiguous(), beta_TN.contiguous(), state, slots_B)
    chosen = GatedDeltaLaunch.from_list(launch)
    if num_decodes:
        decode(*inputs, num_decodes, out_TNV, chosen)
    if chunks_C3 is not None and sequences_S8 is not None:
        prefill(*inputs, chunks_C3, sequences_S8, out_TNV, chosen)
    return out_TNV


def _with_whole_rows(x_TND: torch.Tensor) -> torch.Tensor:
    """x with a token's heads one after the other; tokens may be any distance apart."""
    return x_TND if x_TND.stride()[1:] == (x_TND.shape[2], 1) else x_TND.contiguous()


@triton.jit(do_not_specialize=["num_values"])
def gates_kernel(
    a, b, a_log, dt_bias, decay, beta, num_values, a_stride, b_stride, N: tl.constexpr, BLOCK: tl.constexpr
):
    """Program: a block of the T * N values."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_values
    token, head = index // N, index % N
    x = tl.load(a + token.to(tl.int64) * a_stride + head, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(dt_bias + head, mask=inside, other=0.0)
    # softplus(x) = max(x, 0) + log1p(y); Triton has no log1p, and log(1 + y) loses small y.
    y = tl.exp(-tl.abs(x))
    one_more = 1.0 + y
    log1p = tl.where(
        one_more == 1.0, y, tl.log(one_more) * y / tl.where(one_more == 1.0, 1.0, one_more - 1.0)
    )
    rate = tl.exp(tl.load(a_log + head, mask=inside, other=0.0))
    tl.store(decay + index, -rate * (tl.maximum(x, 0.0) + log1p), mask=inside)
    at = b + token.to(tl.int64) * b_stride + head
    gate = tl.sigmoid(tl.load(at, mask=inside, other=0.0).to(tl.float32))
    tl.store(beta + index, gate.to(beta.dtype.element_ty), mask=inside)


def _empty_gates(a, b, a_log, dt_bias):
    return a.new_empty(a.shape, dtype=torch.float32), b.new_empty(b.shape)


@custom_op(
    "delta_gates(Tensor a, Tensor b, Tensor a_log, Tensor dt_bias) -> (Tensor, Tensor)", fake=_empty_gates
)
def delta_gates(
    a_TN: torch.Tensor, b_TN: torch.Tensor, a_log_N: torch.Tensor, dt_bias_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `moe_kernels.gated_delta.delta_gates`."""
    decay_TN = a_TN.new_empty(a_TN.shape, dtype=torch.float32)
    beta_TN = b_TN.new_empty(b_TN.shape)
    a_TN, b_TN = (x if x.stride(1) == 1 else x.contiguous() for x in (a_TN, b_TN))
    if a_TN.numel():
        gates_kernel[(triton.cdiv(a_TN.numel(), GATES_BLOCK),)](
            a_TN,
            b_TN,
            a_log_N,
            dt_bias_N,
            decay_TN,
            beta_TN,
            a_TN.numel(),
            a_TN.stride(0),
            b_TN.stride(0),
            N=a_TN.shape[1],
            BLOCK=GATES_BLOCK,
        )
    return decay_TN, beta_TN
