"""Qwen3-Next: Gated DeltaNet and gated full attention in turns, with a mixture of experts after each.

Shape legend: T tokens of this rank, H hidden, V vocabulary, R rotary size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from moe_kernels import blocks
from moe_kernels.blocks.decoder import DecoderBlock, LayerBlocks, takes
from moe_kernels.select import KernelPlan
from moe_models.batch import ForwardBatch
from moe_models.interfaces import (
    CausalLM,
    ExpertShard,
    KVCache,
    LayerCache,
    LayerCacheSpec,
    ModelDescription,
    StateCache,
    TensorLoad,
    TokenDispatcher,
    WeightMap,
    one_call_of,
)
from moe_models.layers.attention import GatedAttention
from moe_models.layers.embedding import Embedding
from moe_models.layers.for_cache import ForCache
from moe_models.layers.gated_delta_net import GatedDeltaNet
from moe_models.layers.linear import Linear
from moe_models.layers.moe import GatedMLP, SparseMoE
from moe_models.layers.norm import ZeroCenteredRMSNorm
from moe_models.layers.rotary import RotaryTable
from moe_models.qwen3_next_config import Qwen3NextConfig

# Tensors of Hub checkpoints that the model has no use for: multi-token prediction, and saved frequencies.
_IGNORED: tuple[str, ...] = (r"mtp\..*", r"(.*\.)?rotary_emb\.inv_freq")


def _attention(config: Qwen3NextConfig, plan: KernelPlan) -> GatedAttention:
    return GatedAttention(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        plan=plan,
    )


def _delta_net(config: Qwen3NextConfig, plan: KernelPlan) -> GatedDeltaNet:
    return GatedDeltaNet(
        hidden_size=config.hidden_size,
        num_key_heads=config.linear_num_key_heads,
        num_value_heads=config.linear_num_value_heads,
        key_size=config.linear_key_head_dim,
        value_size=config.linear_value_head_dim,
        conv_kernel=config.linear_conv_kernel_dim,
        eps=config.rms_norm_eps,
        plan=plan,
    )


def _moe(config: Qwen3NextConfig, shard: ExpertShard, plan: KernelPlan) -> SparseMoE:
    return SparseMoE(
        hidden_size=config.hidden_size,
        intermediate_size=config.moe_intermediate_size,
        shared_intermediate_size=config.shared_expert_intermediate_size,
        top_k=config.num_experts_per_tok,
        renormalize=config.norm_topk_prob,
        shard=shard,
        plan=plan,
    )


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the mixer is one of two kinds, and so is the MLP."""

    mixer: GatedAttention | GatedDeltaNet
    mlp: SparseMoE | GatedMLP

    def __init__(self, config: Qwen3NextConfig, index: int, shard: ExpertShard, plan: KernelPlan) -> None:
        super().__init__()
        eps, hidden = config.rms_norm_eps, config.hidden_size
        self.input_norm = ZeroCenteredRMSNorm(hidden, eps, plan.norm)
        full = config.layer_types[index] == "full_attention"
        self.mixer = _attention(config, plan) if full else _delta_net(config, plan)
        self.mlp_norm = ZeroCenteredRMSNorm(hidden, eps, plan.norm)
        sparse = index in config.sparse_layers
        self.mlp = _moe(config, shard, plan) if sparse else GatedMLP(hidden, config.intermediate_size, plan)

    def forward(
        self,
        x_TH: torch.Tensor,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        batch: ForwardBatch,
        cache: LayerCache,
        dispatcher: TokenDispatcher,
        step: blocks.Step | None,
    ) -> torch.Tensor:
        """x_TH after the layer; updates `cache`. A dense layer makes no dispatch. `step`: whole layers in one call."""
        if isinstance(self.mixer, GatedAttention):
            assert isinstance(cache, KVCache)
            x_TH = self.mixer(x_TH, self.input_norm, cos_TR, sin_TR, batch, cache, step)
        else:
            assert isinstance(cache, StateCache)
            x_TH = self.mixer(x_TH, self.input_norm, batch, cache, step)
        if isinstance(self.mlp, SparseMoE):
            return self.mlp(x_TH, self.mlp_norm, dispatcher, in_blocks=step is not None)
        return x_TH + self.mlp(self.mlp_norm(x_TH))

    def layer_blocks(self, cache: LayerCache) -> LayerBlocks | None:
        """The layer for a call that computes all layers; None: it has no experts, or in another format."""
        if not isinstance(self.mlp, SparseMoE) or not takes(experts := self.mlp.experts.as_weights()):
            return None
        if isinstance(self.mixer, GatedAttention):
            assert isinstance(cache, KVCache)
            mixer: blocks.AttentionBlock | blocks.DeltaNetBlock = self.mixer.block(self.input_norm, cache)
        else:
            assert isinstance(cache, StateCache)
            mixer = self.mixer.block(self.input_norm, cache)
        router, shared = self.mlp.block_pair(self.mlp_norm)
        return LayerBlocks(mixer, router, experts, shared)

    def checkpoint_shapes(self, prefix: str, fused: bool) -> dict[str, tuple[int, ...]]:
        """Tensors of the layer whose names start with `prefix`, and their shapes."""
        hidden = self.input_norm.weight.shape[0]
        mlp, mlp_prefix = self.mlp, f"{prefix}mlp."
        return {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            **self.mixer.checkpoint_shapes(prefix + self._mixer_name()),
            **(
                mlp.checkpoint_shapes(mlp_prefix, fused)
                if isinstance(mlp, SparseMoE)
                else mlp.checkpoint_shapes(mlp_prefix)
            ),
        }

    def loads(self, source: str, target: str, fused: bool) -> list[TensorLoad]:
        """How tensors named `source`... fill the parameters named `target`..."""
        mlp, mlp_source, mlp_target = self.mlp, f"{source}mlp.", f"{target}mlp."
        return [
            TensorLoad(source=f"{source}input_layernorm.weight", target=f"{target}input_norm.weight"),
            TensorLoad(source=f"{source}post_attention_layernorm.weight", target=f"{target}mlp_norm.weight"),
            *self.mixer.loads(source + self._mixer_name(), f"{target}mixer."),
            *(
                mlp.loads(mlp_source, mlp_target, fused)
                if isinstance(mlp, SparseMoE)
                else mlp.loads(mlp_source, mlp_target)
            ),
        ]

    def _mixer_name(self) -> str:
        return "self_attn." if isinstance(self.mixer, GatedAttention) else "linear_attn."


class Qwen3NextForCausalLM(CausalLM):
    """The `Qwen3NextForCausalLM` of Hub checkpoints."""

    @classmethod
    def describe(cls, config: Mapping[str, Any]) -> ModelDescription:
        parsed = Qwen3NextConfig.parse(config)
        return ModelDescription(
            hidden_size=parsed.hidden_size,
            vocab_size=parsed.vocab_size,
            max_position_embeddings=parsed.max_position_embeddings,
            layer_types=parsed.layer_types,
            moe_layers=parsed.sparse_layers,
            num_experts=parsed.num_experts,
            num_experts_per_tok=parsed.num_experts_per_tok,
            moe_intermediate_size=parsed.moe_intermediate_size,
            shared_expert_intermediate_size=parsed.shared_expert_intermediate_size,
            tie_word_embeddings=parsed.tie_word_embeddings,
            num_mtp_layers=parsed.num_mtp_layers,
            head_size=parsed.head_dim,
            num_attention_heads=parsed.num_attention_heads,
            num_kv_heads=parsed.num_key_value_heads,
            linear_key_size=parsed.linear_key_head_dim,
            linear_value_size=parsed.linear_value_head_dim,
            num_linear_key_heads=parsed.linear_num_key_heads,
            num_linear_value_heads=parsed.linear_num_value_heads,
            linear_conv_width=parsed.linear_conv_kernel_dim,
        )

    def __init__(self, config: Mapping[str, Any], shard: ExpertShard, plan: KernelPlan) -> None:
        super().__init__(config, shard, plan)
        parsed = Qwen3NextConfig.parse(config)
        if shard.num_experts != parsed.num_experts:
            raise ValueError(
                f"the expert shard is one of {shard.num_experts} experts; "
                f"wanted num_experts of config.json ({parsed.num_experts})"
            )
        self.config = parsed
        self.isa = plan.blocks.isa
        self._rotary = RotaryTable(parsed.rotary_dim, parsed.rope_theta)
        self._decoder: ForCache[tuple[LayerCache, ...], DecoderBlock | None] = ForCache()
        self.embed_tokens = Embedding(parsed.vocab_size, parsed.hidden_size, plan.linear)
        self.layers = nn.ModuleList(
            DecoderLayer(parsed, index, shard, plan) for index in range(parsed.num_hidden_layers)
        )
        self.norm = ZeroCenteredRMSNorm(parsed.hidden_size, parsed.rms_norm_eps, plan.norm)
        self.lm_head = (
            None if parsed.tie_word_embeddings else Linear(parsed.hidden_size, parsed.vocab_size, plan.linear)
        )

    def cache_specs(self) -> tuple[LayerCacheSpec, ...]:
        dtype = self.embed_tokens.weight.dtype
        return tuple(layer.mixer.cache_spec(dtype) for layer in self._decoder_layers())

    def forward(
        self, batch: ForwardBatch, caches: tuple[LayerCache, ...], dispatcher: TokenDispatcher
    ) -> torch.Tensor:
        cos_TR, sin_TR = self._rotary(batch.positions_T, batch.end, self.embed_tokens.weight.dtype)
        step = None
        if self.isa is not None and batch.num_tokens:
            step = blocks.Step(
                batch.sequences,
                batch.state_slots_B,
                batch.kv_slots_T,
                batch.block_tables_BM,
                cos_TR,
                sin_TR,
            )
            decoder = self._decoder.get(caches, lambda: self._make_decoder(caches))
            one_call = one_call_of(dispatcher)
            if decoder is not None and one_call is not None:
                hidden_NH, chosen = decoder(batch.token_ids_T, step, batch.wanted_N, one_call.exchange)
                one_call.record(chosen)
                return hidden_NH
        x_TH = self.embed_tokens(batch.token_ids_T)
        for layer, cache in zip(self.layers, caches, strict=True):
            x_TH = layer(x_TH, cos_TR, sin_TR, batch, cache, dispatcher, step)
        return self.norm(x_TH if batch.wanted_N is None else x_TH[batch.wanted_N])

    def _make_decoder(self, caches: tuple[LayerCache, ...]) -> DecoderBlock | None:
        """All but the head in one call, if each layer has experts that this can compute."""
        assert self.isa is not None, "only asked for where the plan has blocks"
        found = [
            layer.layer_blocks(cache) for layer, cache in zip(self._decoder_layers(), caches, strict=True)
        ]
        layers = [layer for layer in found if layer is not None]
        if len(layers) < len(found):
            return None
        return DecoderBlock(self.embed_tokens.weight, layers, self.norm.weight, self.isa)

    def compute_logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens.logits(hidden_NH) if self.lm_head is None else self.lm_head(hidden_NH)

    def weight_map(self, has_tensor: Callable[[str], bool]) -> WeightMap:
        shape = (self.config.vocab_size, self.config.hidden_size)
        expected = {"model.embed_tokens.weight": shape, "model.norm.weight": shape[1:]}
        loads = [
            TensorLoad(source="model.embed_tokens.weight", target="embed_tokens.weight"),
            TensorLoad(source="model.norm.weight", target="norm.weight"),
        ]
        ignored = _IGNORED
        if self.lm_head is None:
            ignored = (*_IGNORED, r"lm_head\.weight")
        else:
            expected["lm_head.weight"] = shape
            loads.append(TensorLoad(source="lm_head.weight", target="lm_head.weight"))
        for index, layer in enumerate(self._decoder_layers()):
            source, target = f"model.layers.{index}.", f"layers.{index}."
            fused = has_tensor(f"{source}mlp.experts.gate_up_proj")
            expected.update(layer.checkpoint_shapes(source, fused))
            loads += layer.loads(source, target, fused)
        return WeightMap(expected=expected, loads=tuple(loads), ignored=ignored)

    def parameter_kind(self, name: str) -> str:
        if ".mlp.experts." in name:
            return "expert"
        if ".mixer." in name:
            index = int(name.split(".")[1])
            return self.config.layer_types[index].removeprefix("full_")
        return "other"

    def _decoder_layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]
