"""The prefill of the gated delta rule by flash-linear-attention; decodes and checkpoints by our own kernels.

fla-core (MIT) asks the GPU for its properties when it is imported, so it is imported at the first call. Version
0.6 neither waits for the device nor tunes itself while serving if it is told where chunks start (it would read the
lengths back) and is given normalised keys (its own norm is tuned anew for every 65,536 rows).
"""

from __future__ import annotations

import torch

from moe_kernels.custom_op import custom_op
from moe_kernels.gated_delta import triton
from moe_kernels.gated_delta.launch import GatedDeltaLaunch
from moe_kernels.norm.triton import rms_norm
from moe_kernels.sequences import PackedSequences


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
    """See `moe_kernels.gated_delta.gated_delta_rule`; bfloat16 and float16."""
    inputs = (q_TND, k_TND, v_TNV, decay_TN, beta_TN)
    tables, n = sequences.prefill_tables, sequences.num_decodes
    # The library returns the state after a sequence's last token alone.
    if tables is None or sequences.state_checkpoints:
        return triton.gated_delta_rule(*inputs, state, state_slots_B, sequences, launch=launch)
    # `narrow`, since fake CUDA tensors cannot be indexed with slices in a build without CUDA.
    rest = [x.narrow(0, n, x.shape[0] - n) for x in inputs]
    lengths = (sequences.prefill_cu_seqlens, sequences.prefill_chunk_indices)
    prefilled_TNV = _prefill(*rest, state, state_slots_B, tables.sequences_S8, *lengths)
    if not n:
        return prefilled_TNV
    q, k, v, decay, beta = (x.narrow(0, 0, n) for x in inputs)
    return torch.cat([triton.decode_step(q, k, v, decay, beta, state, state_slots_B, launch), prefilled_TNV])


def _empty_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    sequences: torch.Tensor,
    cu_seqlens: torch.Tensor,
    chunk_indices: torch.Tensor,
) -> torch.Tensor:
    return v.new_empty(v.shape)


@custom_op(
    "gated_delta_rule_fla(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor beta, Tensor(a!) state, "
    "Tensor slots, Tensor sequences, Tensor cu_seqlens, Tensor chunk_indices) -> Tensor",
    fake=_empty_out,
)
def _prefill(
    q_TND: torch.Tensor,
    k_TND: torch.Tensor,
    v_TNV: torch.Tensor,
    decay_TN: torch.Tensor,
    beta_TN: torch.Tensor,
    state: torch.Tensor,
    slots_B: torch.Tensor,
    sequences_S8: torch.Tensor,
    cu_seqlens: torch.Tensor,
    chunk_indices: torch.Tensor,
) -> torch.Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    slots_S = slots_B[sequences_S8[:, 0].long()]
    has_context_S111 = (sequences_S8[:, 1] > 0)[:, None, None, None]
    group = v_TNV.shape[1] // k_TND.shape[1]
    # Not every version takes fewer heads of q and k than of v.
    q, k = (_l2_norm(x).repeat_interleave(group, dim=1) for x in (q_TND, k_TND))
    out, final = chunk_gated_delta_rule(
        q[None],
        k[None],
        v_TNV.contiguous()[None],
        g=decay_TN[None],
        beta=beta_TN[None],
        initial_state=torch.where(has_context_S111, state[slots_S], 0.0),
        output_final_state=True,
        cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices,
    )
    state[slots_S] = final.to(state.dtype)
    return out[0]


def _l2_norm(x_TND: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum(x^2) + 1e-6) over the last dimension, rounded once."""
    size = x_TND.shape[2]
    root = x_TND.new_full((size,), size**-0.5, dtype=torch.float32)
    return rms_norm(x_TND, root, 1e-6 / size, False)
