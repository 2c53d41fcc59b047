"""EngineConfig: how a deployment is laid out and run. Every user-facing check of it lives here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from moe_runtime.errors import ConfigError, did_you_mean, refuse_unknown
from moe_runtime.quantization import check_method

_CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "dispatcher": ("auto", "all_to_all", "all_gather", "shared_memory"),
    "scheduling_policy": ("fcfs", "priority"),
    "placement_strategy": ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"),
}
_AT_LEAST_ONE = (
    "expert_parallel_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_memory_bytes",
    "threads_per_rank",
    "max_waiting",
    "state_checkpoint_interval",
)
_POSITIVE = ("inspection_timeout_s", "process_group_timeout_s", "placement_timeout_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one deployment, in vLLM's names where vLLM has them. None means: derived at start-up."""

    expert_parallel_size: int = 1  # ranks; the experts are divided over them
    device: str = "auto"  # auto: cuda where the cluster has GPUs
    dtype: str = "auto"  # auto: the checkpoint's own
    quantization: str | None = (
        None  # int8: quantise at load (CPUs); fp8: an FP8 checkpoint; None: the checkpoint's
    )
    max_model_len: int | None = None  # tokens of prompt and output together; None: the model's, or what fits
    max_num_seqs: int = 256  # sequences a rank runs at once
    max_num_batched_tokens: int = 2048  # tokens a rank computes in one step
    max_waiting: int | None = (
        None  # requests that may wait on a rank before more are refused; None: any number
    )
    scheduling_policy: str = "fcfs"  # who runs first: by arrival, or by the request's priority and arrival
    enable_prefix_caching: bool = (
        True  # prompts skip what an earlier one with the same beginning has computed
    )
    state_checkpoint_interval: int | None = (
        None  # tokens of a prompt between kept DeltaNet states; None: derived
    )
    block_size: int = 16  # tokens in one KV cache block
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory for weights, caches and work space
    kv_cache_memory_bytes: int | None = None  # bytes a rank for KV blocks and state slots
    threads_per_rank: int | None = None  # CPU threads a rank; None: the node's cores divided by its ranks
    dispatcher: str = "auto"  # how tokens travel between ranks
    inspection_timeout_s: float = 60.0
    placement_strategy: str = "PACK"  # Ray's: ranks on few nodes, or spread over many; STRICT_: or not at all
    placement_timeout_s: float = 60.0  # to wait for nodes to join, and for resources that others use
    process_group_timeout_s: float = 120.0  # after which a collective gives up on a silent rank

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                hint = did_you_mean(str(value), choices)
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")
        check_method(self.quantization)
        defaults = {field.name: field.default for field in fields(self)}
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is None and defaults[name] is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigError(f"{name} must be a number of seconds above 0, got {value!r}")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization must be above 0 and at most 1, got {share!r}")

        if not isinstance(self.enable_prefix_caching, bool):
            raise ConfigError(
                f"enable_prefix_caching must be True or False, got {self.enable_prefix_caching!r}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running sequence gets a token a step"
            )

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> EngineConfig:
        """Build from keyword arguments; an unknown one is refused by name with the nearest match."""
        refuse_unknown(kwargs, [f.name for f in dataclasses.fields(cls)], "LLM")
        return cls(**kwargs)
