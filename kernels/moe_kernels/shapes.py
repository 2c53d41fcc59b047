"""KernelShapes: the sizes of a model, on one rank, that the choice of kernels depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelShapes:
    """Sizes of one rank's share of a model. A size is 0 where the model has no such layer."""

    hidden_size: int
    num_experts: int  # logical experts of the whole model
    num_local_experts: int  # those of this rank
    top_k: int
    moe_intermediate_size: int
    max_tokens: int  # rows that may reach this rank's experts at once
    head_size: int = 0  # of full attention
    num_heads: int = 0
    num_kv_heads: int = 0
    key_size: int = 0  # of Gated DeltaNet
    value_size: int = 0
    num_key_heads: int = 0
    num_value_heads: int = 0
    conv_width: int = 0  # taps, of its convolution
    expert_dtype: torch.dtype | None = None  # what the experts' weights are kept in; None: the model's dtype

    def rows_per_expert(self, num_tokens: int) -> float:
        """Mean rows of a local expert when `num_tokens` tokens choose uniformly."""
        return num_tokens * self.top_k / max(self.num_experts, 1)
