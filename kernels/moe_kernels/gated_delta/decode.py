"""The Triton kernel for decodes: one token of each sequence, its state read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.gated_delta.launch import GatedDeltaLaunch


@triton.jit
def decode_kernel(
    q,
    k,
    v,
    decay,
    beta,
    state,
    slots,
    out,
    q_stride,
    k_stride,
    v_stride,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program (block of V, value head, sequence)."""
    head = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    key_head = head // (VALUE_HEADS // KEY_HEADS)
    d = tl.arange(0, BLOCK_D)
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_d, in_v = d < D, columns < V

    slot = tl.load(slots + token).to(tl.int64)
    at = state + (slot * VALUE_HEADS + head) * (D * V) + d[:, None] * V + columns[None, :]
    in_state = in_d[:, None] & in_v[None, :]
    old = tl.load(at, mask=in_state, other=0.0).to(tl.float32)
    q_D = tl.load(q + token * q_stride + key_head * D + d, mask=in_d, other=0.0).to(tl.float32)
    k_D = tl.load(k + token * k_stride + key_head * D + d, mask=in_d, other=0.0).to(tl.float32)
    v_V = tl.load(v + token * v_stride + head * V + columns, mask=in_v, other=0.0).to(tl.float32)
    decay_1 = tl.exp(tl.load(decay + token * VALUE_HEADS + head).to(tl.float32))
    beta_1 = tl.load(beta + token * VALUE_HEADS + head).to(tl.float32)

    q_D *= tl.rsqrt(tl.sum(q_D * q_D) + 1e-6) * (D**-0.5)
    k_D *= tl.rsqrt(tl.sum(k_D * k_D) + 1e-6)
    decayed = old * decay_1
    update_V = beta_1 * (v_V - tl.sum(decayed * k_D[:, None], axis=0))
    # q S after the update, from S before it: both sums over the state are then independent of each other.
    out_V = tl.sum(decayed * q_D[:, None], axis=0) + tl.sum(q_D * k_D) * update_V
    tl.store(at, (decayed + k_D[:, None] * update_V[None, :]).to(state.dtype.element_ty), mask=in_state)
    at_out = out + (token * VALUE_HEADS + head) * V + columns
    tl.store(at_out, out_V.to(out.dtype.element_ty), mask=in_v)


def decode(
    q_TND: torch.Tensor,
    k_TND: torch.Tensor,
    v_TNV: torch.Tensor,
    decay_TN: torch.Tensor,
    beta_TN: torch.Tensor,
    state: torch.Tensor,
    slots_B: torch.Tensor,
    num_decodes: int,
    out_TNV: torch.Tensor,
    launch: GatedDeltaLaunch,
) -> None:
    """Fill the first `num_decodes` rows of out and update their sequences' slots; heads are contiguous."""
    key_heads, key_size = k_TND.shape[1:]
    value_heads, value_size = v_TNV.shape[1:]
    block_v = min(launch.decode_block_v, triton.next_power_of_2(value_size))
    decode_kernel[(triton.cdiv(value_size, block_v), value_heads, num_decodes)](
        q_TND,
        k_TND,
        v_TNV,
        decay_TN,
        beta_TN,
        state,
        slots_B,
        out_TNV,
        q_TND.stride(0),
        k_TND.stride(0),
        v_TNV.stride(0),
        KEY_HEADS=key_heads,
        VALUE_HEADS=value_heads,
        D=key_size,
        V=value_size,
        BLOCK_D=triton.next_power_of_2(key_size),
        BLOCK_V=block_v,
        num_warps=launch.decode_warps,
    )
