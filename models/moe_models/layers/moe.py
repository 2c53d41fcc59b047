"""Feed-forward layers: the dense one, and the mixture of experts with a gated shared expert.

Shape legend: T tokens of this rank, G tokens after dispatch, H hidden, F intermediate, E logical experts,
L local experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from moe_kernels import blocks
from moe_kernels.blocks.weights import ExpertWeights
from moe_kernels.grouped_gemm import fused_experts
from moe_kernels.norm import silu_and_mul
from moe_kernels.routing import route
from moe_kernels.select import KernelPlan
from moe_models.interfaces import ExpertShard, TensorLoad, TokenDispatcher
from moe_models.layers.linear import Linear, empty_weight
from moe_models.layers.norm import ZeroCenteredRMSNorm

# Rows that the experts compute at once. Routing may send every rank's tokens to one rank; this bounds what its
# work space has to hold, however many ranks there are.
_MAX_ROWS = 8192


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int, plan: KernelPlan) -> None:
        super().__init__()
        self.activation = plan.norm.implementation
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, plan.linear)
        self.down_proj = Linear(intermediate_size, hidden_size, plan.linear)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """out_TH."""
        return self.down_proj(silu_and_mul(self.gate_up_proj(x_TH), implementation=self.activation))

    def checkpoint_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Tensors of the layer whose names start with `prefix`, and their shapes."""
        hidden, intermediate = self.down_proj.weight.shape
        return {
            f"{prefix}gate_proj.weight": (intermediate, hidden),
            f"{prefix}up_proj.weight": (intermediate, hidden),
            f"{prefix}down_proj.weight": (hidden, intermediate),
        }

    def loads(self, source: str, target: str) -> list[TensorLoad]:
        """How tensors named `source`... fill the parameters named `target`..."""
        size = self.down_proj.weight.shape[1]
        stacked, gate, up = f"{target}gate_up_proj.weight", slice(0, size), slice(size, 2 * size)
        return [
            TensorLoad(source=f"{source}gate_proj.weight", target=stacked, target_index=(gate,)),
            TensorLoad(source=f"{source}up_proj.weight", target=stacked, target_index=(up,)),
            TensorLoad(source=f"{source}down_proj.weight", target=f"{target}down_proj.weight"),
        ]


class Experts(nn.Module):
    """The experts of this rank as two stacked parameters, however many they are.

    Every parameter, scales of quantised weights included, has a row for each local expert: whoever moves an
    expert moves its row of each.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, shard: ExpertShard, plan: KernelPlan
    ) -> None:
        super().__init__()
        self.shard = shard
        self.choice = plan.grouped_gemm
        num_local = len(shard.local_experts)
        kept_in = plan.grouped_gemm.weights
        self.gate_up_proj, self.gate_up_proj_scale = empty_weight(
            num_local, 2 * intermediate_size, hidden_size, kept_in=kept_in
        )
        self.down_proj, self.down_proj_scale = empty_weight(
            num_local, hidden_size, intermediate_size, kept_in=kept_in
        )

    def forward(
        self, x_GH: torch.Tensor, local_ids_GK: torch.Tensor, weights_GK: torch.Tensor
    ) -> torch.Tensor:
        """y_GH: each token's weighted sum over its local experts."""
        if x_GH.shape[0] <= _MAX_ROWS:
            return self._sum(x_GH, local_ids_GK, weights_GK)
        parts = zip(
            x_GH.split(_MAX_ROWS), local_ids_GK.split(_MAX_ROWS), weights_GK.split(_MAX_ROWS), strict=True
        )
        return torch.cat([self._sum(*part) for part in parts])

    def as_weights(self) -> ExpertWeights:
        """What a whole model in one call takes."""
        return ExpertWeights(self.gate_up_proj, self.down_proj, self.gate_up_proj_scale, self.down_proj_scale)

    def _sum(self, x_GH: torch.Tensor, local_ids_GK: torch.Tensor, weights_GK: torch.Tensor) -> torch.Tensor:
        return fused_experts(
            x_GH,
            local_ids_GK,
            weights_GK,
            self.gate_up_proj,
            self.down_proj,
            self.gate_up_proj_scale,
            self.down_proj_scale,
            implementation=self.choice.implementation,
            launch=self.choice.launch,
        )

    def checkpoint_shapes(self, prefix: str, fused: bool) -> dict[str, tuple[int, ...]]:
        """Tensors of all E experts whose names start with `prefix`, and their shapes."""
        _, hidden, size = self.down_proj.shape
        num_experts = self.shard.num_experts
        if fused:
            return {
                f"{prefix}gate_up_proj": (num_experts, 2 * size, hidden),
                f"{prefix}down_proj": (num_experts, hidden, size),
            }
        shapes: dict[str, tuple[int, ...]] = {}
        for expert in range(num_experts):
            shapes[f"{prefix}{expert}.gate_proj.weight"] = (size, hidden)
            shapes[f"{prefix}{expert}.up_proj.weight"] = (size, hidden)
            shapes[f"{prefix}{expert}.down_proj.weight"] = (hidden, size)
        return shapes

    def loads(self, source: str, target: str, fused: bool) -> list[TensorLoad]:
        """How tensors named `source`... fill this rank's parameters named `target`..."""
        if fused:
            return [
                TensorLoad(
                    source=source + name, target=target + name, source_index=(there,), target_index=(here,)
                )
                for there, here in self._runs()
                for name in ("gate_up_proj", "down_proj")
            ]
        size = self.down_proj.shape[2]
        # Made once: a checkpoint has tens of thousands of these tensors.
        gate, up = slice(0, size), slice(size, 2 * size)
        gate_up, down = f"{target}gate_up_proj", f"{target}down_proj"
        loads = []
        for here, there in enumerate(self.shard.local_experts):
            name = f"{source}{there}."
            loads += [
                TensorLoad(source=f"{name}gate_proj.weight", target=gate_up, target_index=(here, gate)),
                TensorLoad(source=f"{name}up_proj.weight", target=gate_up, target_index=(here, up)),
                TensorLoad(source=f"{name}down_proj.weight", target=down, target_index=(here,)),
            ]
        return loads

    def _runs(self) -> Iterator[tuple[slice, slice]]:
        """(logical slice, local slice) of each run of experts that stand side by side in both orders."""
        experts = self.shard.local_experts
        start = 0
        for stop in range(1, len(experts) + 1):
            if stop == len(experts) or experts[stop] != experts[stop - 1] + 1:
                yield slice(experts[start], experts[stop - 1] + 1), slice(start, stop)
                start = stop


class SparseMoE(nn.Module):
    """Routed experts, wherever they live, plus a shared expert weighted by sigmoid(gate(x)) on this rank."""

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        shared_intermediate_size: int,
        top_k: int,
        renormalize: bool,
        shard: ExpertShard,
        plan: KernelPlan,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.renormalize = renormalize
        self.routing = plan.routing.implementation
        self.isa = plan.blocks.isa
        self._blocks: tuple[blocks.RouterBlock, blocks.SharedExpertBlock] | None = None
        # Rounded, a router chooses other experts; and the gate is a single row.
        exact = plan.linear.unquantized()
        self.router = Linear(hidden_size, shard.num_experts, exact)
        self.experts = Experts(hidden_size, intermediate_size, shard, plan)
        self.shared_expert = GatedMLP(hidden_size, shared_intermediate_size, plan)
        self.shared_expert_gate = Linear(hidden_size, 1, exact)

    def forward(
        self, x_TH: torch.Tensor, norm: ZeroCenteredRMSNorm, dispatcher: TokenDispatcher, in_blocks: bool
    ) -> torch.Tensor:
        """x plus the layer's output for norm(x).

        Every rank must call this for the layer in the same step, with tokens or without.

        Args:
            in_blocks: with one call before the experts and one after them.
        """
        if not in_blocks:
            return x_TH + self._mix(norm(x_TH), dispatcher)
        route_block, shared_block = self.block_pair(norm)
        normed_TH, ids_TK, weights_TK = route_block(x_TH)
        return shared_block(x_TH, normed_TH, self._route(normed_TH, ids_TK, weights_TK, dispatcher))

    def block_pair(self, norm: ZeroCenteredRMSNorm) -> tuple[blocks.RouterBlock, blocks.SharedExpertBlock]:
        """What comes before the experts in one call, and what after them."""
        if self._blocks is None:
            self._blocks = self._make_blocks(norm)
        return self._blocks

    def _make_blocks(self, norm: ZeroCenteredRMSNorm) -> tuple[blocks.RouterBlock, blocks.SharedExpertBlock]:
        assert self.isa is not None, "a step for blocks comes with a plan that has them"
        router = self.router.as_weight()
        shared = blocks.SharedExpertWeights(
            self.shared_expert.gate_up_proj.as_weight(),
            self.shared_expert.down_proj.as_weight(),
            self.shared_expert_gate.as_weight(),
        )
        return (
            blocks.RouterBlock(norm.weight, norm.eps, router, self.top_k, self.renormalize, self.isa),
            blocks.SharedExpertBlock(shared, self.isa),
        )

    def _mix(self, x_TH: torch.Tensor, dispatcher: TokenDispatcher) -> torch.Tensor:
        """out_TH, operation by operation."""
        topk_ids_TK, topk_weights_TK = route(
            self.router(x_TH), self.top_k, self.renormalize, implementation=self.routing
        )
        routed_TH = self._route(x_TH, topk_ids_TK, topk_weights_TK, dispatcher)
        return routed_TH + torch.sigmoid(self.shared_expert_gate(x_TH)) * self.shared_expert(x_TH)

    def _route(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, dispatcher: TokenDispatcher
    ) -> torch.Tensor:
        """The chosen experts' weighted sums, from wherever they live."""
        dispatched = dispatcher.dispatch(x_TH, ids_TK, weights_TK)
        y_GH = self.experts(dispatched.x_GH, dispatched.local_ids_GK, dispatched.weights_GK)
        return dispatcher.combine(y_GH, dispatched)

    def checkpoint_shapes(self, prefix: str, fused: bool) -> dict[str, tuple[int, ...]]:
        """Tensors of the layer whose names start with `prefix`, and their shapes."""
        return {
            f"{prefix}gate.weight": tuple(self.router.weight.shape),
            **self.experts.checkpoint_shapes(f"{prefix}experts.", fused),
            **self.shared_expert.checkpoint_shapes(f"{prefix}shared_expert."),
            f"{prefix}shared_expert_gate.weight": tuple(self.shared_expert_gate.weight.shape),
        }

    def loads(self, source: str, target: str, fused: bool) -> list[TensorLoad]:
        """How tensors named `source`... fill the parameters named `target`..."""
        shared_gate = "shared_expert_gate.weight"
        return [
            TensorLoad(source=f"{source}gate.weight", target=f"{target}router.weight"),
            *self.experts.loads(f"{source}experts.", f"{target}experts.", fused),
            *self.shared_expert.loads(f"{source}shared_expert.", f"{target}shared_expert."),
            TensorLoad(source=source + shared_gate, target=target + shared_gate),
        ]
