"""What one layer of experts has to give, in float64, and how near a kernel's result has to be.

Shape legend: G tokens, H hidden, R a block of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from moe_kernels.grouped_gemm import fused_experts
from moe_kernels.grouped_gemm.launch import GroupedGemmLaunch
from moe_kernels.grouped_gemm.tiles import TINY
from moe_kernels.quant import BLOCK, dequantize
from moe_runtime.bench.kernels.gpu_experts import ExpertInputs, ExpertWeights

# Of a result in bfloat16, relative to the largest value: what the kernels' tests allow.
TOLERANCE = 2e-2


def relative_error(y_GH: torch.Tensor, wanted_GH: torch.Tensor) -> float:
    """The largest difference as a share of the largest value wanted; inf where a result is not finite."""
    if not y_GH.isfinite().all():
        return float("inf")
    scale = max(wanted_GH.abs().max().item(), 1e-30)
    return (y_GH.double() - wanted_GH).abs().max().item() / scale


def rounds_activations(launch: GroupedGemmLaunch, num_rows: int, weights: ExpertWeights) -> bool:
    """Whether the kernels for so many rows multiply float8 by float8, so that activations are rounded to it."""
    is_float8 = weights.gate_up_scale is not None
    return is_float8 and launch.native_fp8 and launch.bucket(num_rows).regime != TINY


def experts_float64(weights: ExpertWeights, inputs: ExpertInputs, *, rounds: bool) -> torch.Tensor:
    """y_GH in float64; with `rounds`, both products take their activations in float8. Waits for the device."""
    x, ids, scale = inputs.x_GH.double(), inputs.ids_GK, inputs.weights_GK.double()
    if weights.gate_up_scale is None or weights.down_scale is None or not rounds:
        scales = (weights.gate_up_scale, weights.down_scale)
        return fused_experts(x, ids, scale, weights.gate_up_L2FH, weights.down_LHF, *scales)
    y_GH = torch.zeros_like(x)
    for expert in ids[ids >= 0].unique().tolist():
        token, k = (ids == expert).nonzero(as_tuple=True)
        gate_up = dequantize(weights.gate_up_L2FH[expert], weights.gate_up_scale[expert], torch.float64)
        down = dequantize(weights.down_LHF[expert], weights.down_scale[expert], torch.float64)
        gate, up = F.linear(_to_float8_and_back(x[token]), gate_up).chunk(2, dim=-1)
        # Between the products the kernels keep the activations' type.
        h = (F.silu(gate) * up).to(inputs.x_GH.dtype).double()
        y_GH.index_add_(0, token, F.linear(_to_float8_and_back(h), down) * scale[token, k, None])
    return y_GH


def _to_float8_and_back(x_RH: torch.Tensor) -> torch.Tensor:
    """Each row's blocks of 128 columns as float8 with a scale of their own."""
    width = x_RH.shape[1]
    blocks = F.pad(x_RH, (0, -width % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = (blocks.abs().amax(2, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max).clamp_min(1e-30)
    codes = (blocks / scale).float().to(torch.float8_e4m3fn)
    return (codes.double() * scale).flatten(1)[:, :width]
