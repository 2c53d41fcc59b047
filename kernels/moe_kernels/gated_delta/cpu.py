"""The gated delta rule in native code: the recurrence itself, for decodes and prompts alike."""

from __future__ import annotations

import torch

from moe_kernels.gated_delta import reference
from moe_kernels.native.library import native_function
from moe_kernels.sequences import PackedSequences

_DTYPES = (torch.float32, torch.bfloat16)
MAX_KEY_SIZE = 256  # MAX_KEY of delta.cpp


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
    isa: str,
) -> torch.Tensor:
    """See `moe_kernels.gated_delta.gated_delta_rule`; other dtypes than float32 and bfloat16 are the reference's."""
    num_heads, key_size, value_size = state.shape[1:]
    dtype = v_TNV.dtype
    if dtype not in _DTYPES or state.dtype != torch.float32 or key_size > MAX_KEY_SIZE:
        return reference.gated_delta_rule(
            q_TND, k_TND, v_TNV, decay_TN, beta_TN, state, state_slots_B, sequences
        )
    assert state.is_contiguous(), "a layer's states lie in one piece"
    q, k, v = (_heads_side_by_side(x, dtype) for x in (q_TND, k_TND, v_TNV))
    # Kept by name until the call is over, as only their addresses are handed on.
    decay, beta = decay_TN.float().contiguous(), beta_TN.to(dtype).contiguous()
    checkpoints = sequences.checkpoints_on_host
    out_TNV = v.new_empty(v.shape)
    native_function("moe_gated_delta_rule", isa)(
        q.data_ptr(),
        q.stride(0),
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        decay.data_ptr(),
        beta.data_ptr(),
        state.data_ptr(),
        state_slots_B.data_ptr(),
        sequences.cu_seqlens.data_ptr(),
        sequences.context_lens_B.data_ptr(),
        out_TNV.data_ptr(),
        len(sequences.query_lens),
        sequences.num_decodes,
        checkpoints.data_ptr(),
        checkpoints.shape[0],
        num_heads,
        num_heads // k.shape[1],
        key_size,
        value_size,
        dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out_TNV


def delta_gates(
    a_TN: torch.Tensor, b_TN: torch.Tensor, a_log_N: torch.Tensor, dt_bias_N: torch.Tensor, *, isa: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `moe_kernels.gated_delta.delta_gates`."""
    if a_TN.dtype not in _DTYPES or b_TN.dtype != a_TN.dtype or a_TN.stride(1) != 1 or b_TN.stride(1) != 1:
        return reference.delta_gates(a_TN, b_TN, a_log_N, dt_bias_N)
    decay_TN, beta_TN = a_TN.new_empty(a_TN.shape, dtype=torch.float32), b_TN.new_empty(b_TN.shape)
    native_function("moe_delta_gates", isa)(
        a_TN.data_ptr(),
        a_TN.stride(0),
        b_TN.data_ptr(),
        b_TN.stride(0),
        a_log_N.data_ptr(),
        dt_bias_N.data_ptr(),
        *a_TN.shape,
        decay_TN.data_ptr(),
        beta_TN.data_ptr(),
        a_TN.dtype == torch.bfloat16,
    )
    return decay_TN, beta_TN


def _heads_side_by_side(x_TND: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x, or a copy where the values of a token do not lie in one piece."""
    x_TND = x_TND.to(dtype)
    lies_whole = x_TND.stride(2) == 1 and x_TND.stride(1) == x_TND.shape[2]
    return x_TND if lies_whole else x_TND.contiguous()
