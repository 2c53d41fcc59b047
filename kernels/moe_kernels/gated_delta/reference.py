"""The gated delta rule in plain torch: chunks for prefill, one recurrent step for all decodes.

Shape legend: T tokens, B sequences, N value heads, D key size, V value size, C tokens of a chunk. Inside,
q and k are repeated to the value heads, and the functions for one sequence have heads before tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from moe_kernels.numerics import accumulation_dtype
from moe_kernels.sequences import PackedSequences

CHUNK_SIZE = 64
_L2_EPS = 1e-6


def gated_delta_rule(
    q_TND: torch.Tensor,
    k_TND: torch.Tensor,
    v_TNV: torch.Tensor,
    decay_TN: torch.Tensor,
    beta_TN: torch.Tensor,
    state: torch.Tensor,
    state_slots_B: torch.Tensor,
    sequences: PackedSequences,
) -> torch.Tensor:
    """See `moe_kernels.gated_delta.gated_delta_rule`."""
    dtype = accumulation_dtype(v_TNV.dtype)
    group = v_TNV.shape[1] // k_TND.shape[1]
    q = (_l2_normalize(q_TND.to(dtype)) * q_TND.shape[-1] ** -0.5).repeat_interleave(group, dim=1)
    k = _l2_normalize(k_TND.to(dtype)).repeat_interleave(group, dim=1)
    v, decay, beta = v_TNV.to(dtype), decay_TN.to(dtype), beta_TN.to(dtype)
    out_TNV = torch.empty(v.shape, dtype=dtype, device=v.device)

    n = sequences.num_decodes
    if n:
        slots = state_slots_B[:n]
        old = state[slots].to(dtype)
        out_TNV[:n], new = recurrent_step(q[:n], k[:n], v[:n], decay[:n], beta[:n], old)
        state[slots] = new.to(state.dtype)
    for index, tokens, has_context, checkpoints in sequences.prefills():
        slot = state_slots_B[index : index + 1]
        # A new sequence's slot holds whatever was there before, NaN included: never multiply it by zero.
        now_NDV = state[slot][0].to(dtype) if has_context else v.new_zeros(state.shape[1:])
        for part, checkpoint_slot in _parts(tokens, checkpoints):
            q_NTD, k_NTD, v_NTV, decay_NT, beta_NT = (x[part].transpose(0, 1) for x in (q, k, v, decay, beta))
            out_NTV, now_NDV = chunked(q_NTD, k_NTD, v_NTV, decay_NT, beta_NT, now_NDV)
            out_TNV[part] = out_NTV.transpose(0, 1)
            if checkpoint_slot is not None:
                state[checkpoint_slot] = now_NDV.to(state.dtype)
        state[slot] = now_NDV.to(state.dtype)[None]
    return out_TNV.to(v_TNV.dtype)


def delta_gates(
    a_TN: torch.Tensor, b_TN: torch.Tensor, a_log_N: torch.Tensor, dt_bias_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `moe_kernels.gated_delta.delta_gates`."""
    return -a_log_N.exp() * F.softplus(a_TN.float() + dt_bias_N), b_TN.sigmoid()


def _parts(tokens: slice, checkpoints: list[tuple[int, int]]) -> Iterator[tuple[slice, int | None]]:
    """A sequence's tokens up to each checkpoint, with its slot, and what is left after the last."""
    start = tokens.start
    for num_tokens, slot in checkpoints:
        yield slice(start, tokens.start + num_tokens), slot
        start = tokens.start + num_tokens
    if start < tokens.stop:
        yield slice(start, tokens.stop), None


def recurrent_step(
    q_BND: torch.Tensor,
    k_BND: torch.Tensor,
    v_BNV: torch.Tensor,
    decay_BN: torch.Tensor,
    beta_BN: torch.Tensor,
    state_BNDV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each of B sequences: (out_BNV, new state_BNDV)."""
    state_BNDV = state_BNDV * decay_BN.exp()[..., None, None]
    predicted_BNV = torch.einsum("bnd,bndv->bnv", k_BND, state_BNDV)
    update_BNV = beta_BN[..., None] * (v_BNV - predicted_BNV)
    state_BNDV = state_BNDV + k_BND[..., :, None] * update_BNV[..., None, :]
    return torch.einsum("bnd,bndv->bnv", q_BND, state_BNDV), state_BNDV


def chunked(
    q_NTD: torch.Tensor,
    k_NTD: torch.Tensor,
    v_NTV: torch.Tensor,
    decay_NT: torch.Tensor,
    beta_NT: torch.Tensor,
    state_NDV: torch.Tensor,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence of any length, `chunk_size` tokens at a time: (out_NTV, state after the last token)."""
    outs = []
    for start in range(0, q_NTD.shape[1], chunk_size):
        chunk = slice(start, start + chunk_size)
        out_NCV, state_NDV = _one_chunk(
            q_NTD[:, chunk],
            k_NTD[:, chunk],
            v_NTV[:, chunk],
            decay_NT[:, chunk],
            beta_NT[:, chunk],
            state_NDV,
        )
        outs.append(out_NCV)
    return torch.cat(outs, dim=1), state_NDV


def _one_chunk(
    q_NCD: torch.Tensor,
    k_NCD: torch.Tensor,
    v_NCV: torch.Tensor,
    decay_NC: torch.Tensor,
    beta_NC: torch.Tensor,
    state_NDV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unrolling the recurrence over a chunk gives a unit lower triangular system for the updates u_i:

    u_i + beta_i sum_{j<i} exp(g_i - g_j) (k_i . k_j) u_j = beta_i (v_i - exp(g_i) k_i S), where g is the
    running sum of decays and S the state at the chunk's start.
    """
    g_NC = decay_NC.cumsum(dim=-1)
    size = g_NC.shape[-1]
    causal_CC = torch.ones(size, size, dtype=torch.bool, device=g_NC.device).tril()
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    pair_decay_NCC = (g_NC[:, :, None] - g_NC[:, None, :]).masked_fill(~causal_CC, -torch.inf).exp()
    from_start_NC1 = g_NC.exp()[..., None]
    k_T = k_NCD.transpose(1, 2)

    # The solver takes the diagonal for 1, whatever stands there.
    system_NCC = beta_NC[..., None] * (k_NCD @ k_T) * pair_decay_NCC
    wanted_NCV = beta_NC[..., None] * (v_NCV - from_start_NC1 * (k_NCD @ state_NDV))
    update_NCV = torch.linalg.solve_triangular(system_NCC, wanted_NCV, upper=False, unitriangular=True)

    out_NCV = from_start_NC1 * (q_NCD @ state_NDV) + ((q_NCD @ k_T) * pair_decay_NCC) @ update_NCV
    to_end_NC1 = (g_NC[:, -1:] - g_NC).exp()[..., None]
    state_NDV = (
        g_NC[:, -1].exp()[:, None, None] * state_NDV + (k_NCD * to_end_NC1).transpose(1, 2) @ update_NCV
    )
    return out_NCV, state_NDV


def _l2_normalize(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + _L2_EPS)
