"""One layer of experts on a GPU: its inputs, what it is compared with, and what it has to do at least.

Shape legend: G tokens of all ranks, K top-k, L local experts, H hidden, F expert intermediate, R local choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from moe_kernels.aot.roofline import Work
from moe_kernels.aot.work import weight_bytes_of
from moe_kernels.grouped_gemm import fused_experts
from moe_kernels.shapes import KernelShapes

FLOAT8 = torch.float8_e4m3fn
_SCALE_BLOCK = 128


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Random weights of one layer's local experts."""

    gate_up_L2FH: torch.Tensor
    down_LHF: torch.Tensor
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """One step's tokens: every choice is as likely as any other; those of other ranks' experts are -1."""

    x_GH: torch.Tensor
    ids_GK: torch.Tensor
    weights_GK: torch.Tensor
    counts_L: tuple[int, ...]  # choices of each local expert, on the host

    def work(self, shapes: KernelShapes, weight_dtype: torch.dtype) -> Work:
        """Each active expert's weights are read once, each token and each result moved once."""
        hidden, inner = shapes.hidden_size, shapes.moe_intermediate_size
        active = sum(count > 0 for count in self.counts_L)
        weights = active * 3 * inner * hidden * weight_bytes_of(weight_dtype)
        values = 2 * self.x_GH.numel() * self.x_GH.element_size()
        return Work(6.0 * sum(self.counts_L) * inner * hidden, weights + values)


def make_weights(shapes: KernelShapes, weight_dtype: torch.dtype, device: str = "cuda") -> ExpertWeights:
    """In bfloat16, or in float8 with a scale for each block of 128 x 128."""
    local, hidden, inner = shapes.num_local_experts, shapes.hidden_size, shapes.moe_intermediate_size
    bf16, on = torch.bfloat16, torch.device(device)
    gate_up = torch.randn(local, 2 * inner, hidden, device=on, dtype=bf16) * hidden**-0.5
    down = torch.randn(local, hidden, inner, device=on, dtype=bf16) * inner**-0.5
    if weight_dtype != FLOAT8:
        return ExpertWeights(gate_up, down)
    return ExpertWeights(
        (gate_up * _SCALE_BLOCK).to(FLOAT8), (down * _SCALE_BLOCK).to(FLOAT8), _scales(gate_up), _scales(down)
    )


def _scales(weight: torch.Tensor) -> torch.Tensor:
    blocks = (-(-size // _SCALE_BLOCK) for size in weight.shape[1:])
    return torch.full((weight.shape[0], *blocks), 1 / _SCALE_BLOCK, device=weight.device)


def make_inputs(shapes: KernelShapes, num_tokens: int, seed: int, device: str = "cuda") -> ExpertInputs:
    """`num_tokens` (G) tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, shapes.num_experts, generator=generator).topk(shapes.top_k).indices
    ids = torch.where(ids < shapes.num_local_experts, ids, -1)
    counts = torch.bincount(ids[ids >= 0], minlength=shapes.num_local_experts)
    return ExpertInputs(
        torch.randn(num_tokens, shapes.hidden_size, generator=generator).to(device, torch.bfloat16),
        ids.to(device),
        torch.rand(num_tokens, shapes.top_k, generator=generator).to(device, torch.bfloat16),
        tuple(counts.tolist()),
    )


def ours(weights: ExpertWeights, inputs: ExpertInputs, launch: Any) -> Callable[[], object]:
    """The Triton kernels."""
    return lambda: fused_experts(
        inputs.x_GH,
        inputs.ids_GK,
        inputs.weights_GK,
        weights.gate_up_L2FH,
        weights.down_LHF,
        weights.gate_up_scale,
        weights.down_scale,
        implementation="triton",
        launch=launch,
    )


def torch_grouped_mm(weights: ExpertWeights, inputs: ExpertInputs) -> Callable[[], object]:
    """torch.nn.functional.grouped_mm on rows sorted by expert, sorting and summing included."""
    num_rows, top_k = sum(inputs.counts_L), inputs.ids_GK.shape[1]
    num_local = weights.down_LHF.shape[0]
    experts = torch.arange(num_local, device=inputs.x_GH.device)
    gate_up, down = weights.gate_up_L2FH.transpose(1, 2), weights.down_LHF.transpose(1, 2)

    def call() -> torch.Tensor:
        flat = inputs.ids_GK.view(-1)
        order = torch.where(flat < 0, num_local, flat).argsort(stable=True)[:num_rows]
        ends = torch.searchsorted(flat[order], experts, right=True).to(torch.int32)
        token = order // top_k
        gate, up = F.grouped_mm(inputs.x_GH[token], gate_up, offs=ends).chunk(2, dim=-1)
        y_RH = F.grouped_mm(F.silu(gate) * up, down, offs=ends)
        y_RH = y_RH * inputs.weights_GK.view(-1)[order].unsqueeze(1)
        return torch.zeros_like(inputs.x_GH).index_add_(0, token, y_RH)

    return call


def loop_over_experts(weights: ExpertWeights, inputs: ExpertInputs) -> Callable[[], object]:
    """Two products for each expert that has rows; the host knows the counts without asking, which flatters it."""
    num_local, top_k = weights.down_LHF.shape[0], inputs.ids_GK.shape[1]

    def call() -> torch.Tensor:
        flat = inputs.ids_GK.view(-1)
        order = torch.where(flat < 0, num_local, flat).argsort(stable=True)
        y_GH = torch.zeros_like(inputs.x_GH)
        start = 0
        for expert, count in enumerate(inputs.counts_L):
            if not count:
                continue
            rows = order[start : start + count]
            start += count
            gate, up = F.linear(inputs.x_GH[rows // top_k], weights.gate_up_L2FH[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, weights.down_LHF[expert])
            y_GH.index_add_(0, rows // top_k, y * inputs.weights_GK.view(-1)[rows].unsqueeze(1))
        return y_GH

    return call
