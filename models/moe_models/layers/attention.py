"""Gated full attention: grouped-query attention with norms on q and k, partial rotary and a sigmoid gate.

Shape legend: T tokens, H hidden, N query heads, M key heads, D head size, R rotary size.
"""

from __future__ import annotations

import torch
from torch import nn

from moe_kernels import blocks
from moe_kernels.attention import paged_attention
from moe_kernels.norm import apply_rotary
from moe_kernels.select import KernelPlan
from moe_models.batch import ForwardBatch
from moe_models.interfaces import KVCache, KVCacheSpec, TensorLoad
from moe_models.layers.for_cache import ForCache
from moe_models.layers.linear import Linear
from moe_models.layers.norm import ZeroCenteredRMSNorm


class GatedAttention(nn.Module):
    """out_proj(attention(rotary(norm(q)), rotary(norm(k)), v) * sigmoid(gate)), as in Qwen3-Next."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        plan: KernelPlan,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.eps = eps
        self.attention = plan.attention
        self.rotary = plan.norm.implementation
        self.isa = plan.blocks.isa
        self._block: ForCache[KVCache, blocks.AttentionBlock] = ForCache()
        self.q_size = num_heads * head_dim
        self.kv_size = num_kv_heads * head_dim
        # Rows: q of all heads, gate of all heads, k, v.
        self.in_proj = Linear(hidden_size, 2 * self.q_size + 2 * self.kv_size, plan.linear)
        self.q_norm = ZeroCenteredRMSNorm(head_dim, eps, plan.norm)
        self.k_norm = ZeroCenteredRMSNorm(head_dim, eps, plan.norm)
        self.out_proj = Linear(self.q_size, hidden_size, plan.linear)

    def forward(
        self,
        x_TH: torch.Tensor,
        norm: ZeroCenteredRMSNorm,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        batch: ForwardBatch,
        cache: KVCache,
        step: blocks.Step | None,
    ) -> torch.Tensor:
        """x plus the layer's output for norm(x); writes keys and values into `cache`. `step`: in one call."""
        if step is None:
            return x_TH + self._attend(norm(x_TH), cos_TR, sin_TR, batch, cache)
        return self.block(norm, cache)(x_TH, step)

    def block(self, norm: ZeroCenteredRMSNorm, cache: KVCache) -> blocks.AttentionBlock:
        """The layer in one call; made anew for another cache."""
        return self._block.get(cache, lambda: self._make_block(norm, cache))

    def _make_block(self, norm: ZeroCenteredRMSNorm, cache: KVCache) -> blocks.AttentionBlock:
        assert self.isa is not None, "a step for blocks comes with a plan that has them"
        weights = blocks.AttentionWeights(
            norm.weight,
            self.in_proj.as_weight(),
            self.q_norm.weight,
            self.k_norm.weight,
            self.out_proj.as_weight(),
        )
        return blocks.AttentionBlock(weights, self.eps, cache.k, cache.v, self.isa)

    def _attend(
        self,
        x_TH: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        batch: ForwardBatch,
        cache: KVCache,
    ) -> torch.Tensor:
        """out_TH, operation by operation."""
        sizes = [self.q_size, self.q_size, self.kv_size, self.kv_size]
        q, gate, k, v = self.in_proj(x_TH).split(sizes, dim=-1)
        q_TND = self.q_norm(q.unflatten(-1, (self.num_heads, self.head_dim)))
        k_TMD = self.k_norm(k.unflatten(-1, (self.num_kv_heads, self.head_dim)))
        v_TMD = v.unflatten(-1, (self.num_kv_heads, self.head_dim))
        q_TND, k_TMD = apply_rotary(q_TND, k_TMD, cos_TR, sin_TR, implementation=self.rotary)
        out_TND = paged_attention(
            q_TND,
            k_TMD,
            v_TMD,
            cache.k,
            cache.v,
            batch.kv_slots_T,
            batch.block_tables_BM,
            batch.sequences,
            self.head_dim**-0.5,
            gate.unflatten(-1, (self.num_heads, self.head_dim)),
            implementation=self.attention.implementation,
            launch=self.attention.launch,
        )
        return self.out_proj(out_TND.flatten(1))

    def cache_spec(self, dtype: torch.dtype) -> KVCacheSpec:
        """What this layer keeps per token, in the model's dtype."""
        return KVCacheSpec(num_kv_heads=self.num_kv_heads, head_size=self.head_dim, dtype=dtype)

    def checkpoint_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Tensors of the layer whose names start with `prefix`, and their shapes."""
        hidden = self.out_proj.weight.shape[0]
        return {
            f"{prefix}q_proj.weight": (2 * self.q_size, hidden),
            f"{prefix}k_proj.weight": (self.kv_size, hidden),
            f"{prefix}v_proj.weight": (self.kv_size, hidden),
            f"{prefix}o_proj.weight": (hidden, self.q_size),
            f"{prefix}q_norm.weight": (self.head_dim,),
            f"{prefix}k_norm.weight": (self.head_dim,),
        }

    def loads(self, source: str, target: str) -> list[TensorLoad]:
        """How tensors named `source`... fill the parameters named `target`..."""
        q_end, kv = 2 * self.q_size, self.kv_size
        return [
            TensorLoad(
                source=f"{source}q_proj.weight",
                target=f"{target}in_proj.weight",
                target_index=(slice(0, q_end),),
                source_rows=self._query_rows(),
            ),
            TensorLoad(
                source=f"{source}k_proj.weight",
                target=f"{target}in_proj.weight",
                target_index=(slice(q_end, q_end + kv),),
            ),
            TensorLoad(
                source=f"{source}v_proj.weight",
                target=f"{target}in_proj.weight",
                target_index=(slice(q_end + kv, q_end + 2 * kv),),
            ),
            TensorLoad(source=f"{source}o_proj.weight", target=f"{target}out_proj.weight"),
            TensorLoad(source=f"{source}q_norm.weight", target=f"{target}q_norm.weight"),
            TensorLoad(source=f"{source}k_norm.weight", target=f"{target}k_norm.weight"),
        ]

    def _query_rows(self) -> torch.Tensor:
        """The checkpoint holds each head's query and then its gate; here all queries come first."""
        rows = torch.arange(2 * self.q_size, device="cpu")
        return rows.view(self.num_heads, 2, self.head_dim).transpose(0, 1).flatten()
