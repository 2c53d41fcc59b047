"""ModelInfo: what a model is, learnt without its weights and without an accelerator. Round-trips through JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.inspection.fit import Fit, compute_fit


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFacts:
    """What tokenizer_config.json and config.json say about tokens; nothing of it needs a tokenizer."""

    vocab_size: int  # rows of the embedding
    has_chat_template: bool
    eos_token: str | None
    bos_token: str | None
    eos_token_ids: tuple[int, ...]  # from config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectionFacts:
    """Where and at what cost the inspection ran; a cached answer keeps those of the run that made it."""

    node: str  # host name
    interpreter: str  # path of the Python that imported the model
    seconds: float  # in the inspecting process, from its start to its answer
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What inspection returns. Byte counts are for parameters in `dtype`, or quantised with their scales."""

    architecture: str
    model_class: str  # "module:Class"
    modalities: tuple[str, ...]
    layer_types: tuple[str, ...]  # "full_attention" or "linear_attention", in layer order
    moe_layers: tuple[int, ...]  # indices of the layers with experts
    hidden_size: int
    vocab_size: int
    max_model_len: int  # tokens
    tie_word_embeddings: bool
    num_experts: int  # logical experts a MoE layer; 0: a dense model
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int  # 0: no shared expert
    num_mtp_layers: int
    dtype: str  # "bfloat16", ...
    quantization: str | None  # "int8" (asked for), "fp8" (the checkpoint's), or None
    parameters: Mapping[
        str, int
    ]  # count by kind, scales not counted: expert, attention, linear_attention, other
    parameter_bytes: Mapping[str, int]  # bytes by the same kinds
    kv_bytes_per_token: int  # of all full-attention layers
    state_bytes_per_request: int  # of all Gated DeltaNet layers, whatever the length
    tokenizer: TokenizerFacts
    warnings: tuple[str, ...]
    inspection: InspectionFacts

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: all outside the experts, and the top-k experts of each MoE layer."""
        experts = self.parameters.get("expert", 0)
        if not experts:
            return self.num_parameters
        return self.num_parameters - experts + experts * self.num_experts_per_tok // self.num_experts

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, each once."""
        return sum(self.parameter_bytes.values())

    @property
    def legal_ep_sizes(self) -> range:
        """Every EP size that gives each rank at least one expert; a dense model has only 1."""
        return range(1, max(1, self.num_experts) + 1)

    def check_ep_size(self, ep_size: int) -> None:
        """Raise ConfigError unless `ep_size` is legal."""
        if isinstance(ep_size, bool) or not isinstance(ep_size, int) or ep_size < 1:
            raise ConfigError(f"expert_parallel_size must be a whole number of at least 1, got {ep_size!r}")
        if ep_size not in self.legal_ep_sizes:
            raise ConfigError(
                f"expert_parallel_size={ep_size} is more than the {self.num_experts} experts of "
                f"{self.architecture}; use at most {self.legal_ep_sizes[-1]}"
            )

    def weight_bytes_per_rank(self, ep_size: int) -> int:
        """Bytes on the fullest rank: its share of the experts (rounded up) and all other parameters."""
        self.check_ep_size(ep_size)
        expert_bytes = self.parameter_bytes.get("expert", 0)
        if not expert_bytes:
            return self.weight_bytes
        local_experts = -(-self.num_experts // ep_size)
        return self.weight_bytes - expert_bytes + expert_bytes * local_experts // self.num_experts

    def sequence_bytes(self, num_tokens: int) -> int:
        """Cache bytes of one sequence of `num_tokens` tokens, its recurrent state included; at least 1."""
        return max(1, self.state_bytes_per_request + self.kv_bytes_per_token * num_tokens)

    def fit(self, device_memory: int, ep_size: int, memory_utilization: float = 0.9) -> Fit:
        """How many sequences of what length a rank holds on a device of `device_memory` bytes, or why none.

        Weights and caches may take `memory_utilization` of the device; activations, communication buffers and
        the device's own context live in the rest. Each rank holds its own sequences, so a deployment holds
        `ep_size` times as many. Raises ConfigError for an illegal EP size or share.
        """
        return compute_fit(self, device_memory, ep_size, memory_utilization)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that survive JSON."""
        data: dict[str, Any] = json.loads(self.to_json())
        return data

    def to_json(self) -> str:
        """One JSON object; `from_json` gives back an equal ModelInfo."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelInfo:
        """Inverse of `to_json`. Raises ValueError, KeyError or TypeError where `text` is something else."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelInfo:
        """Inverse of `to_dict`."""
        values = {name: _tuples(value) for name, value in data.items()}
        values["tokenizer"] = TokenizerFacts(**{k: _tuples(v) for k, v in data["tokenizer"].items()})
        values["inspection"] = InspectionFacts(**data["inspection"])
        return cls(**values)


def _tuples(value: Any) -> Any:
    """JSON has only lists; every sequence of ours is a tuple."""
    return tuple(value) if isinstance(value, list) else value
