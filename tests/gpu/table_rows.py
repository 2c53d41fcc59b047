"""The experts' result in every bucket of a launch against the reference, on whatever device."""

from __future__ import annotations

import torch

from moe_kernels.grouped_gemm.launch import GroupedGemmLaunch
from moe_kernels.grouped_gemm.tiles import REGIMES
from moe_kernels.quant import quantize_fp8
from moe_kernels.shapes import KernelShapes
from moe_runtime.bench.kernels.experts_reference import (
    TOLERANCE,
    experts_float64,
    relative_error,
    rounds_activations,
)
from moe_runtime.bench.kernels.gpu_experts import FLOAT8, ExpertWeights, make_inputs, make_weights, ours


def wrong_rows(launch: GroupedGemmLaunch, shapes: KernelShapes, dtype: torch.dtype, device: str) -> list[str]:
    """One line for each bucket whose result is too far from the reference; [] where all are right."""
    torch.manual_seed(0)
    weights = uneven_weights(shapes, dtype, device)
    wrong = []
    for num_rows in launch.warm_up_rows():
        inputs = make_inputs(shapes, num_rows, seed=num_rows, device=device)
        rounds = rounds_activations(launch, num_rows, weights)
        y = ours(weights, inputs, launch)()
        assert isinstance(y, torch.Tensor)
        error = relative_error(y, experts_float64(weights, inputs, rounds=rounds))
        if error > TOLERANCE:
            bucket = launch.bucket(num_rows)
            wrong.append(
                f"{num_rows} rows, {REGIMES[bucket.regime]}, {bucket.gate_up} and {bucket.down}: {error:.2e}"
            )
    return wrong


def uneven_weights(shapes: KernelShapes, dtype: torch.dtype, device: str) -> ExpertWeights:
    """As `make_weights`, but that in float8 each block has a scale of its own: another's would show."""
    weights = make_weights(shapes, torch.bfloat16, device)
    if dtype != FLOAT8:
        return weights
    gate_up, down = weights.gate_up_L2FH, weights.down_LHF
    gate_up[:, :, 128:] *= 8
    down[:, 128:] *= 8
    (gate_up, gate_up_scale), (down, down_scale) = quantize_fp8(gate_up), quantize_fp8(down)
    return ExpertWeights(gate_up, down, gate_up_scale, down_scale)
