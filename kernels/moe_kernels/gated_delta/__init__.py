"""The gated delta rule over packed sequences, with the state of each carried in a slot.

Shape legend: T tokens, B sequences, N heads, D key size, V value size.
"""

from __future__ import annotations

import torch

from moe_kernels.gated_delta import reference
from moe_kernels.implementations import find_implementation
from moe_kernels.sequences import PackedSequences

_TABLE = {"reference": reference.gated_delta_rule}


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
    implementation: str = "reference",
) -> torch.Tensor:
    """out_TNV, in v's dtype; each sequence's state is read from its slot and written back.

    For every token of a sequence, with q and k divided by their L2 norms (eps 1e-6) and q by sqrt(D):
    S = exp(decay) S;  S = S + k (beta (v - k S))^T;  out = q S.

    q and k have fewer heads than v, or as many: head i of them serves the i-th group of consecutive value
    heads, and decay (log space, at most 0), beta and state have v's. `state` is [slots, N, D, V], float32
    (float64 for float64 inputs); a sequence without context starts from zeros whatever its slot holds.
    `sequences.state_checkpoints` says where the state is written to other slots as well. Chunks of the prefill
    form are counted from the first token of this call, and anew after each checkpoint. Source: Gated Delta
    Networks (arXiv:2412.06464), as Qwen3-Next has it.
    """
    run = find_implementation("gated_delta", _TABLE, implementation)
    return run(q_TND, k_TND, v_TNV, decay_TN, beta_TN, state, state_slots_B, sequences)
