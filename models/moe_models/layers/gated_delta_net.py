"""Gated DeltaNet: linear attention whose state is decayed, corrected by the delta rule, and gated.

Shape legend: T tokens, H hidden, C convolution channels, N value heads, D key size, V value size.
"""

from __future__ import annotations

import torch
from torch import nn

from moe_kernels import blocks
from moe_kernels.conv import causal_conv1d
from moe_kernels.gated_delta import delta_gates, gated_delta_rule
from moe_kernels.norm import rms_norm_gated
from moe_kernels.select import KernelPlan
from moe_models.batch import ForwardBatch
from moe_models.interfaces import StateCache, StateCacheSpec, TensorLoad
from moe_models.layers.for_cache import ForCache
from moe_models.layers.linear import Linear, empty_parameter
from moe_models.layers.norm import ZeroCenteredRMSNorm


class GatedDeltaNet(nn.Module):
    """out_proj(norm(delta_rule(silu(conv(q, k, v)), decay(a), sigmoid(b))) * silu(z)), as in Qwen3-Next."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_key_heads: int,
        num_value_heads: int,
        key_size: int,
        value_size: int,
        conv_kernel: int,
        eps: float,
        plan: KernelPlan,
    ) -> None:
        super().__init__()
        self.num_key_heads = num_key_heads
        self.num_value_heads = num_value_heads
        self.key_size = key_size
        self.value_size = value_size
        self.eps = eps
        self.conv = plan.conv.implementation
        self.gated_delta = plan.gated_delta
        self.norm = plan.norm.implementation
        self.isa = plan.blocks.isa
        self._block: ForCache[StateCache, blocks.DeltaNetBlock] = ForCache()
        self.keys = num_key_heads * key_size
        self.values = num_value_heads * value_size
        self.channels = 2 * self.keys + self.values
        # Rows: q of all heads, k, v, z; and b of all heads, a.
        self.in_proj_qkvz = Linear(hidden_size, self.channels + self.values, plan.linear)
        self.in_proj_ba = Linear(hidden_size, 2 * num_value_heads, plan.linear)
        self.conv_weight = empty_parameter(self.channels, 1, conv_kernel)
        # Exponents: a rounding of these to bfloat16 would change how long the state lives.
        self.A_log = empty_parameter(num_value_heads, dtype=torch.float32)
        self.dt_bias = empty_parameter(num_value_heads, dtype=torch.float32)
        self.norm_weight = empty_parameter(value_size)
        self.out_proj = Linear(self.values, hidden_size, plan.linear)

    def forward(
        self,
        x_TH: torch.Tensor,
        norm: ZeroCenteredRMSNorm,
        batch: ForwardBatch,
        cache: StateCache,
        step: blocks.Step | None,
    ) -> torch.Tensor:
        """x plus the layer's output for norm(x); updates the sequences' slots in `cache`. `step`: in one call."""
        if step is None:
            return x_TH + self._mix(norm(x_TH), batch, cache)
        return self.block(norm, cache)(x_TH, step)

    def block(self, norm: ZeroCenteredRMSNorm, cache: StateCache) -> blocks.DeltaNetBlock:
        """The layer in one call; made anew for another cache."""
        return self._block.get(cache, lambda: self._make_block(norm, cache))

    def _make_block(self, norm: ZeroCenteredRMSNorm, cache: StateCache) -> blocks.DeltaNetBlock:
        assert self.isa is not None, "a step for blocks comes with a plan that has them"
        weights = blocks.DeltaNetWeights(
            norm.weight,
            self.in_proj_qkvz.as_weight(),
            self.in_proj_ba.as_weight(),
            self.conv_weight.squeeze(1),
            self.A_log,
            self.dt_bias,
            self.norm_weight,
            self.out_proj.as_weight(),
        )
        return blocks.DeltaNetBlock(weights, self.eps, cache.conv, cache.state, self.isa)

    def _mix(self, x_TH: torch.Tensor, batch: ForwardBatch, cache: StateCache) -> torch.Tensor:
        """out_TH, operation by operation."""
        sequences = batch.sequences
        qkv_TC, z = self.in_proj_qkvz(x_TH).split([self.channels, self.values], dim=-1)
        b_TN, a_TN = self.in_proj_ba(x_TH).chunk(2, dim=-1)
        qkv_TC = causal_conv1d(
            qkv_TC,
            self.conv_weight.squeeze(1),
            cache.conv,
            batch.state_slots_B,
            sequences,
            implementation=self.conv,
        )
        q, k, v = qkv_TC.split([self.keys, self.keys, self.values], dim=-1)
        decay_TN, beta_TN = delta_gates(
            a_TN, b_TN, self.A_log, self.dt_bias, implementation=self.gated_delta.implementation
        )
        out_TNV = gated_delta_rule(
            q.unflatten(-1, (self.num_key_heads, self.key_size)),
            k.unflatten(-1, (self.num_key_heads, self.key_size)),
            v.unflatten(-1, (self.num_value_heads, self.value_size)),
            decay_TN,
            beta_TN,
            cache.state,
            batch.state_slots_B,
            sequences,
            implementation=self.gated_delta.implementation,
            launch=self.gated_delta.launch,
        )
        z_TNV = z.unflatten(-1, (self.num_value_heads, self.value_size))
        out_TNV = rms_norm_gated(out_TNV, z_TNV, self.norm_weight, self.eps, implementation=self.norm)
        return self.out_proj(out_TNV.flatten(1))

    def cache_spec(self, dtype: torch.dtype) -> StateCacheSpec:
        """What this layer keeps per sequence; convolution inputs in the model's dtype."""
        return StateCacheSpec(
            conv_channels=self.channels,
            conv_width=self.conv_weight.shape[-1] - 1,
            num_heads=self.num_value_heads,
            key_size=self.key_size,
            value_size=self.value_size,
            conv_dtype=dtype,
        )

    def checkpoint_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Tensors of the layer whose names start with `prefix`, and their shapes."""
        hidden, heads = self.out_proj.weight.shape[0], self.num_value_heads
        return {
            f"{prefix}in_proj_qkvz.weight": (self.channels + self.values, hidden),
            f"{prefix}in_proj_ba.weight": (2 * heads, hidden),
            f"{prefix}conv1d.weight": tuple(self.conv_weight.shape),
            f"{prefix}A_log": (heads,),
            f"{prefix}dt_bias": (heads,),
            f"{prefix}norm.weight": (self.value_size,),
            f"{prefix}out_proj.weight": (hidden, self.values),
        }

    def loads(self, source: str, target: str) -> list[TensorLoad]:
        """How tensors named `source`... fill the parameters named `target`..."""
        group = self.num_value_heads // self.num_key_heads
        group_values = group * self.value_size
        qkvz_rows = self._flat_rows([self.key_size, self.key_size, group_values, group_values])
        names = [("conv1d.weight", "conv_weight"), ("norm.weight", "norm_weight")]
        names += [(name, name) for name in ("A_log", "dt_bias", "out_proj.weight")]
        return [
            TensorLoad(
                source=f"{source}in_proj_qkvz.weight",
                target=f"{target}in_proj_qkvz.weight",
                source_rows=qkvz_rows,
            ),
            TensorLoad(
                source=f"{source}in_proj_ba.weight",
                target=f"{target}in_proj_ba.weight",
                source_rows=self._flat_rows([group, group]),
            ),
            *(TensorLoad(source=source + theirs, target=target + ours) for theirs, ours in names),
        ]

    def _flat_rows(self, sizes_per_key_head: list[int]) -> torch.Tensor:
        """The checkpoint holds, for each key head, one part of each size; here each part is whole."""
        total = self.num_key_heads * sum(sizes_per_key_head)
        rows = torch.arange(total, device="cpu").view(self.num_key_heads, -1)
        return torch.cat([part.flatten() for part in rows.split(sizes_per_key_head, dim=1)])
