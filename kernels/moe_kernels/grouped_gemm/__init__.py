"""The experts' two matrix products for all tokens at once, weighted and summed per token.

Shape legend: G tokens after dispatch, K top-k, L local experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

import torch

from moe_kernels.grouped_gemm import reference
from moe_kernels.implementations import find_implementation

_TABLE = {"reference": reference.fused_experts}


def fused_experts(
    x_GH: torch.Tensor,
    local_ids_GK: torch.Tensor,
    weights_GK: torch.Tensor,
    gate_up_L2FH: torch.Tensor,
    down_LHF: torch.Tensor,
    *,
    implementation: str = "reference",
) -> torch.Tensor:
    """Each token's weighted sum over those of its experts that are local: y_GH, in x's dtype.

    An expert computes `down @ (silu(gate @ x) * (up @ x))`; `gate_up_L2FH` holds the gate's F rows, then
    up's. `local_ids_GK` (int64) is -1 where a choice lives elsewhere, and its weight is then ignored.
    A token's choices are distinct, and are summed in float32 (float64 for float64) in ascending order
    of local id. G and L may be 0.
    """
    run = find_implementation("grouped_gemm", _TABLE, implementation)
    return run(x_GH, local_ids_GK, weights_GK, gate_up_L2FH, down_LHF)
