"""Deployment: a model on hardware with a layout, and what of it fits into memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_runtime.errors import ConfigError
from moe_runtime.inspection.sizes import format_size
from moe_runtime.simulate.dispatch import DispatchPlan
from moe_runtime.simulate.hardware import Hardware
from moe_runtime.simulate.measured_kernels import MeasuredExperts
from moe_runtime.simulate.models import SimModel
from moe_runtime.simulate.routing import Layout, Routing

_MAX_EP = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Everything that a step's time depends on, but for the step itself."""

    model: SimModel
    hardware: Hardware
    layout: Layout
    routing: Routing
    dispatch: DispatchPlan
    overlap: bool = False  # two half batches in turns: one computes while the other exchanges
    perfect_balance: bool = False  # what if: every rank has the mean load
    memory_utilization: float = 0.9  # for weights and caches; activations and buffers live in the rest
    measured: MeasuredExperts = field(default_factory=MeasuredExperts)
    time_factor: float = 1.0  # of every step; 1 unless a published figure calibrates

    def __post_init__(self) -> None:
        ranks, per_node = self.layout.num_ranks, self.layout.ranks_per_node
        if not 1 <= ranks <= _MAX_EP:
            raise ConfigError(f"expert_parallel_size must be from 1 to {_MAX_EP}, got {ranks}")
        if ranks > per_node and ranks % per_node:
            raise ConfigError(
                f"expert_parallel_size={ranks} is no multiple of {per_node} GPUs a node; give full nodes"
            )
        if not 0 < self.memory_utilization <= 1:
            raise ConfigError(
                f"memory_utilization must be above 0 and at most 1, got {self.memory_utilization}"
            )

    @property
    def experts_per_rank(self) -> int:
        """Experts on the fullest rank, redundant ones included."""
        experts = self.model.num_experts
        slots = max(experts + self.layout.num_redundant, self.layout.num_ranks)
        return -(-slots // self.layout.num_ranks)

    @property
    def weight_bytes(self) -> float:
        """Of the fullest rank."""
        return self.model.rank_weight_bytes(self.experts_per_rank)

    def max_sequences(self, num_tokens: float) -> int:
        """Sequences of `num_tokens` tokens whose caches a rank holds beside its weights; 0 where none fits."""
        left = self.hardware.memory_bytes * self.memory_utilization - self.weight_bytes
        return max(0, int(left / max(1.0, self.model.sequence_bytes(num_tokens))))

    def why_nothing_fits(self) -> str:
        """One sentence for a table or an error."""
        usable = self.hardware.memory_bytes * self.memory_utilization
        return f"weights need {format_size(self.weight_bytes)} a rank, {format_size(usable)} are usable"
