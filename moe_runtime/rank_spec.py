"""What the driver tells a rank when it creates it, and what the rank says of itself once it is ready."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_runtime.config import EngineConfig
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.modelfiles import ModelFiles
from moe_runtime.registry import ModelTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """What a rank is told when it is created; made by the engine."""

    rank: int
    generation: int  # of the deployment, counted up each time its ranks are joined anew
    config: EngineConfig  # `device` resolved to cpu or cuda
    model_files: ModelFiles
    target: ModelTarget
    placement: ExpertPlacement
    ranks_on_node: int  # ranks that share this rank's node, itself included
    index_on_node: int  # among these


@dataclass(frozen=True, slots=True)
class StartUpStep:
    """A piece of what a rank does before it can serve."""

    phase: str  # "load": amounts are bytes of the checkpoint; "compile": batches that compile kernels
    amount: int  # done since the rank's last one
    total: int | None = None  # of the phase on this rank, where it is known


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What a rank says of itself once it is ready."""

    rank: int
    node_ip: str
    pid: int
    gpu_ids: tuple[str, ...]  # what Ray assigned; empty on CPU ranks
    device: str  # name of the device
    kernel_plan: tuple[str, ...]  # a line for each operation
    dispatcher: str
    num_local_experts: int
    weight_bytes: int
    cache_bytes: int
    cache_tokens: int  # tokens whose keys and values fit
    max_model_len: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStats:
    """What a rank has done since it began to serve, and what it holds now."""

    rank: int
    scheduler: dict[str, int]  # SchedulerStats by name: running, waiting, preemptions, prefix hits, cache use
    loop: dict[str, float]  # LoopStats by name: steps, tokens, seconds of each part
    step_parts: dict[str, float] = field(default_factory=dict)  # seconds of steps by Part's label, counted up
    # What of them was spent in steps in which some rank computed prompts; see PartTimer.prompt_seconds.
    prompt_step_parts: dict[str, float] = field(default_factory=dict)
    step_sizes: tuple[int, ...] = ()  # steps by tokens of this rank: at most 1, 2, 4, 8, ... of them
    moe_layers: tuple[int, ...] = ()  # indices of the layers that have experts
    local_experts: tuple[int, ...] = ()  # logical id of each local expert, the same in every layer
    # Choices of a local expert by a token, counted up: [MoE layers][local experts].
    expert_tokens: tuple[tuple[int, ...], ...] = ()
    sent_bytes: dict[str, int] = field(default_factory=dict)  # by dispatch and combine; see Traffic
