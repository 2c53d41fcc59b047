"""Experts as a loop over those that are hit: the specification of `fused_experts`, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from moe_kernels.numerics import accumulation_dtype
from moe_kernels.quant import dequantize


def fused_experts(
    x_GH: torch.Tensor,
    local_ids_GK: torch.Tensor,
    weights_GK: torch.Tensor,
    gate_up_L2FH: torch.Tensor,
    down_LHF: torch.Tensor,
    gate_up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See `moe_kernels.grouped_gemm.fused_experts`. Reads the experts' counts back to the host.

    Args:
        compute_dtype: what the products are computed in; x's dtype if None.
    """
    compute_dtype = compute_dtype or x_GH.dtype
    num_local = gate_up_L2FH.shape[0]
    y_GH = torch.zeros(x_GH.shape, dtype=accumulation_dtype(x_GH.dtype), device=x_GH.device)
    # Sorted by expert, choices of elsewhere (-1) first; stable, so that rows keep the tokens' order.
    sorted_ids, order = local_ids_GK.flatten().sort(stable=True)
    counts = torch.bincount(sorted_ids + 1, minlength=num_local + 1).tolist()
    rows_of_choice = order // max(local_ids_GK.shape[1], 1)
    weights_of_choice = weights_GK.flatten()[order].to(y_GH.dtype)

    start = counts[0]
    for expert, count in enumerate(counts[1:]):
        if count == 0:
            continue
        chosen = slice(start, start + count)
        start += count
        rows = rows_of_choice[chosen]
        gate_up = _weight(gate_up_L2FH, gate_up_scale, expert, compute_dtype)
        down = _weight(down_LHF, down_scale, expert, compute_dtype)
        gate, up = F.linear(x_GH[rows].to(compute_dtype), gate_up).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down)
        # A token chooses an expert at most once, so rows are distinct and the sum's order is the loop's.
        y_GH.index_add_(0, rows, out.to(y_GH.dtype) * weights_of_choice[chosen, None])
    return y_GH.to(x_GH.dtype)


def fused_experts_float32(
    x_GH: torch.Tensor,
    local_ids_GK: torch.Tensor,
    weights_GK: torch.Tensor,
    gate_up_L2FH: torch.Tensor,
    down_LHF: torch.Tensor,
    gate_up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same, computed in float32: torch's bfloat16 product takes fifty times longer on many CPUs."""
    return fused_experts(
        x_GH,
        local_ids_GK,
        weights_GK,
        gate_up_L2FH,
        down_LHF,
        gate_up_scale,
        down_scale,
        compute_dtype=torch.float32,
    )


def _weight(
    weights: torch.Tensor, scales: torch.Tensor | None, expert: int, dtype: torch.dtype
) -> torch.Tensor:
    if scales is None:
        return weights[expert].to(dtype)
    return dequantize(weights[expert], scales[expert], dtype)
