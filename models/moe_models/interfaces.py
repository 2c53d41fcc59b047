"""What a model needs from outside, and what it must offer: the contract between models and the runtime.

Shape legend: T tokens of this rank, G tokens after dispatch, H hidden, K top-k, L local experts,
V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from moe_kernels.blocks.decoder import Exchange
from moe_kernels.select import KernelPlan
from moe_models.batch import ForwardBatch

# --------------------------------------------------------------------------- experts across ranks


@dataclass(frozen=True, slots=True)
class ExpertShard:
    """The logical experts that this rank holds, in local order; the same in every MoE layer."""

    num_experts: int  # E, logical experts of the model
    local_experts: tuple[int, ...]  # logical id of each local expert

    @classmethod
    def whole(cls, num_experts: int) -> ExpertShard:
        """All experts on one rank."""
        return cls(num_experts, tuple(range(num_experts)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """Tokens that reached this rank, each once, with those of their experts that live here.

    Rows are not sorted by expert: a kernel that wants sorted rows sorts indices, and one for tiny batches
    needs no sort at all.
    """

    x_GH: torch.Tensor
    local_ids_GK: torch.Tensor  # int64, local expert of each choice, -1 where the expert lives elsewhere
    weights_GK: torch.Tensor  # routing weight of each choice; ignored where local_ids_GK is -1
    handle: Any  # what the dispatcher's own `combine` needs; opaque to the model


class TokenDispatcher(Protocol):
    """Carries tokens to the ranks of their experts and weighted partial sums back, for one step."""

    def dispatch(
        self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> Dispatched:
        """Send each token once to every rank that holds some of its experts. T may be zero."""
        ...

    def combine(self, y_GH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Return out_TH: for each token the sum, in rank order, of the ranks' weighted partial sums."""
        ...


def _forget(chosen: torch.Tensor) -> None:
    """Nobody counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OneCall:
    """What a model needs that computes all its layers of a step in one call of native code, without the dispatcher."""

    # How tokens reach the experts of other ranks; None: they stay where they are, and ids are local ids.
    exchange: Exchange | None = None
    # Told which experts of this rank all layers chose, int64 [layers, G, K]; -1 where an expert lives elsewhere, or the
    # last layer had no need of a token.
    record: Callable[[torch.Tensor], None] = _forget


def one_call_of(dispatcher: TokenDispatcher) -> OneCall | None:
    """Its property `one_call`; None where each layer has to call it, as for one that watches or has none."""
    return getattr(dispatcher, "one_call", None)


# --------------------------------------------------------------------------- caches


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """What a full-attention layer keeps per token."""

    num_kv_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_size * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class StateCacheSpec:
    """What a Gated DeltaNet layer keeps per sequence, whatever its length."""

    conv_channels: int
    conv_width: int  # inputs kept: kernel size - 1
    num_heads: int
    key_size: int
    value_size: int
    conv_dtype: torch.dtype
    state_dtype: torch.dtype = torch.float32

    @property
    def bytes_per_sequence(self) -> int:
        conv = self.conv_channels * self.conv_width * self.conv_dtype.itemsize
        return conv + self.num_heads * self.key_size * self.value_size * self.state_dtype.itemsize


@dataclass(frozen=True, slots=True)
class KVCache:
    """Paged keys and values of one full-attention layer."""

    k: torch.Tensor  # [blocks, block_size, num_kv_heads, head_size]
    v: torch.Tensor  # the same


@dataclass(frozen=True, slots=True)
class StateCache:
    """State slots of one Gated DeltaNet layer. A slot holds rubbish until a sequence's first step writes."""

    conv: torch.Tensor  # [slots, conv_channels, conv_width], oldest input first
    state: torch.Tensor  # [slots, num_heads, key_size, value_size]


LayerCacheSpec = KVCacheSpec | StateCacheSpec
LayerCache = KVCache | StateCache

# --------------------------------------------------------------------------- weights


def scale_parameter(name: str) -> str:
    """The parameter that holds the scales of the parameter `name`, where that is int8 or float8_e4m3fn.

    A checkpoint's loads name the weight alone: its scales are filled with it.
    """
    return f"{name}_scale"


def scale_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the model's parameters that hold the scales of others."""
    parameters = model.named_parameters(remove_duplicate=False)
    scaled = (torch.int8, torch.float8_e4m3fn)
    return frozenset(scale_parameter(name) for name, parameter in parameters if parameter.dtype in scaled)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLoad:
    """One copy from a slice of a checkpoint tensor into a slice of a parameter."""

    source: str  # tensor name in the checkpoint
    target: str  # parameter name in the model
    source_index: tuple[int | slice, ...] = ()  # what to read of the source; () is all of it
    target_index: tuple[int | slice, ...] = ()  # where it goes in the target; () is all of it
    source_rows: torch.Tensor | None = None  # int64: reorder dim 0 of what was read before it is copied


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMap:
    """How a checkpoint's tensors fill this rank's parameters."""

    expected: Mapping[str, tuple[int, ...]]  # every tensor of the whole checkpoint, and its shape
    loads: tuple[TensorLoad, ...]  # what this rank reads
    ignored: tuple[str, ...] = ()  # regular expressions (full match) of tensors that may be there unused


# --------------------------------------------------------------------------- the model


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """Facts about an architecture that follow from its configuration alone; no tensor is made for them."""

    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    layer_types: tuple[str, ...]  # "full_attention" or "linear_attention", in order
    moe_layers: tuple[int, ...]  # indices of the layers whose MLP is sparse
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int  # 0: no shared expert
    tie_word_embeddings: bool
    modalities: tuple[str, ...] = ("text",)
    num_mtp_layers: int = 0
    head_size: int = 0  # of full attention; 0: the model has none
    num_attention_heads: int = 0
    num_kv_heads: int = 0
    linear_key_size: int = 0  # of Gated DeltaNet; 0: the model has none
    linear_value_size: int = 0
    num_linear_key_heads: int = 0
    num_linear_value_heads: int = 0
    linear_conv_width: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)


class CausalLM(nn.Module, ABC):
    """A causal language model that the runtime can serve.

    Building one makes its parameters in the default dtype on the default device (the runtime builds under
    `torch.device("meta")` to inspect and on the rank's device to serve) and reads nothing from disk.
    """

    @classmethod
    @abstractmethod
    def describe(cls, config: Mapping[str, Any]) -> ModelDescription:
        """Facts read from a parsed `config.json`.

        Raises ValueError, naming the key, the value seen and the value wanted, where it cannot be used.
        """

    @abstractmethod
    def __init__(self, config: Mapping[str, Any], shard: ExpertShard, plan: KernelPlan) -> None:
        super().__init__()

    @abstractmethod
    def cache_specs(self) -> tuple[LayerCacheSpec, ...]:
        """What each layer keeps between steps, in layer order."""

    @abstractmethod
    def forward(
        self, batch: ForwardBatch, caches: tuple[LayerCache, ...], dispatcher: TokenDispatcher
    ) -> torch.Tensor:
        """Hidden states after the final norm, of all tokens or of `batch.wanted_N` alone; updates the caches."""

    @abstractmethod
    def compute_logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of chosen rows of `forward`'s result, in the model's dtype."""

    @abstractmethod
    def weight_map(self, has_tensor: Callable[[str], bool]) -> WeightMap:
        """How to fill the parameters; `has_tensor(name)` tells which of two layouts a checkpoint uses."""

    @abstractmethod
    def parameter_kind(self, name: str) -> str:
        """ "expert", "attention", "linear_attention" or "other", for a name of `named_parameters`."""
