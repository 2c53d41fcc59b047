"""The gated delta rule over packed sequences, with the state of each carried in a slot.

Shape legend: T tokens, B sequences, N heads, D key size, V value size.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_kernels.implementations import find_implementation
from moe_kernels.sequences import PackedSequences

_TABLE = {
    "reference": "moe_kernels.gated_delta.reference:gated_delta_rule",
    "cpu": "moe_kernels.gated_delta.cpu:gated_delta_rule",
    "triton": "moe_kernels.gated_delta.triton:gated_delta_rule",
    "fla": "moe_kernels.gated_delta.fla:gated_delta_rule",
}
_GATES = {
    "reference": "moe_kernels.gated_delta.reference:delta_gates",
    "cpu": "moe_kernels.gated_delta.cpu:delta_gates",
    "triton": "moe_kernels.gated_delta.triton:delta_gates",
    "fla": "moe_kernels.gated_delta.triton:delta_gates",
}


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
    launch: Any = None,
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
    arguments = (q_TND, k_TND, v_TNV, decay_TN, beta_TN, state, state_slots_B, sequences)
    return run(*arguments) if launch is None else run(*arguments, launch=launch)


def delta_gates(
    a_TN: torch.Tensor,
    b_TN: torch.Tensor,
    a_log_N: torch.Tensor,
    dt_bias_N: torch.Tensor,
    *,
    implementation: str = "reference",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(decay_TN float32 = -exp(a_log) softplus(a + dt_bias), beta_TN = sigmoid(b) in b's dtype).

    `a_log_N` and `dt_bias_N` are float32.
    """
    return find_implementation("gated_delta", _GATES, implementation)(a_TN, b_TN, a_log_N, dt_bias_N)
