"""The experts' two matrix products for all tokens at once, weighted and summed per token.

Shape legend: G tokens after dispatch, K top-k, L local experts, H hidden, F expert intermediate.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_kernels.implementations import find_implementation

_TABLE = {
    "reference": "moe_kernels.grouped_gemm.reference:fused_experts",
    "float32": "moe_kernels.grouped_gemm.reference:fused_experts_float32",
    "cpu": "moe_kernels.grouped_gemm.cpu:fused_experts",
    "triton": "moe_kernels.grouped_gemm.triton:fused_experts",
}


def fused_experts(
    x_GH: torch.Tensor,
    local_ids_GK: torch.Tensor,
    weights_GK: torch.Tensor,
    gate_up_L2FH: torch.Tensor,
    down_LHF: torch.Tensor,
    gate_up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
    *,
    implementation: str = "reference",
    launch: Any = None,
) -> torch.Tensor:
    """Each token's weighted sum over those of its experts that are local: y_GH, in x's dtype.

    An expert computes `down @ (silu(gate @ x) * (up @ x))`; `gate_up_L2FH` holds the gate's F rows, then
    up's. `local_ids_GK` (int64) is -1 where a choice lives elsewhere, and its weight is then ignored.
    A token's choices are distinct, and are summed in float32 (float64 for float64), in an order that does not
    depend on the batch. G and L may be 0.

    Quantised weights have float32 scales: [L, 2F] and [L, H] for int8 ones (a factor for each row),
    [L, ceil(2F / 128), ceil(H / 128)] and [L, ceil(H / 128), ceil(F / 128)] for float8_e4m3fn ones.
    """
    run = find_implementation("grouped_gemm", _TABLE, implementation)
    arguments = (x_GH, local_ids_GK, weights_GK, gate_up_L2FH, down_LHF, gate_up_scale, down_scale)
    return run(*arguments) if launch is None else run(*arguments, launch=launch)
