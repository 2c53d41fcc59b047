"""Qwen3NextConfig: every field of a Qwen3-Next `config.json` that the model uses, checked.

Two styles are read: the Hub's (flat `rope_theta`, `partial_rotary_factor`, `full_attention_interval`) and
that of transformers 5 (`rope_parameters`, `layer_types`). Absent keys have transformers' defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_models.config_fields import (
    Config,
    boolean,
    integer,
    mapping,
    positive_number,
    require_multiple,
    wrong,
)

LAYER_TYPES = ("full_attention", "linear_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3NextConfig:
    """Sizes are in elements; the names are the file's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of dense layers
    num_hidden_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    layer_types: tuple[str, ...]  # of LAYER_TYPES, one a layer
    # full attention
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rotary_dim: int  # leading dimensions of a head that are rotated; even
    # Gated DeltaNet
    linear_conv_kernel_dim: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    # experts
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool
    sparse_layers: tuple[int, ...]  # layers whose MLP is a mixture of experts
    num_mtp_layers: int  # in the checkpoint, unused

    @classmethod
    def parse(cls, config: Config) -> Qwen3NextConfig:
        """Check and read a parsed file. Raises ValueError naming key, value seen and value wanted."""
        _refuse_unsupported(config)
        num_layers = integer(config, "num_hidden_layers", 48)
        head_dim = integer(config, "head_dim", 256)
        num_heads = integer(config, "num_attention_heads", 16)
        num_kv_heads = integer(config, "num_key_value_heads", 2)
        require_multiple("num_attention_heads", num_heads, "num_key_value_heads", num_kv_heads)
        num_key_heads = integer(config, "linear_num_key_heads", 16)
        num_value_heads = integer(config, "linear_num_value_heads", 32)
        require_multiple("linear_num_value_heads", num_value_heads, "linear_num_key_heads", num_key_heads)
        num_experts = integer(config, "num_experts", 512, minimum=0)
        rope_theta, rotary_dim = _rope(config, head_dim)
        return cls(
            vocab_size=integer(config, "vocab_size", 151936),
            hidden_size=integer(config, "hidden_size", 2048),
            intermediate_size=integer(config, "intermediate_size", 5632),
            num_hidden_layers=num_layers,
            max_position_embeddings=integer(config, "max_position_embeddings", 32768),
            rms_norm_eps=positive_number(config, "rms_norm_eps", 1e-6),
            tie_word_embeddings=boolean(config, "tie_word_embeddings", False),
            layer_types=_layer_types(config, num_layers),
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rotary_dim=rotary_dim,
            linear_conv_kernel_dim=integer(config, "linear_conv_kernel_dim", 4, minimum=2),
            linear_key_head_dim=integer(config, "linear_key_head_dim", 128),
            linear_value_head_dim=integer(config, "linear_value_head_dim", 128),
            linear_num_key_heads=num_key_heads,
            linear_num_value_heads=num_value_heads,
            num_experts=num_experts,
            num_experts_per_tok=_experts_per_token(config, num_experts),
            moe_intermediate_size=integer(config, "moe_intermediate_size", 512),
            shared_expert_intermediate_size=integer(config, "shared_expert_intermediate_size", 512),
            norm_topk_prob=boolean(config, "norm_topk_prob", True),
            sparse_layers=_sparse_layers(config, num_layers, num_experts),
            num_mtp_layers=integer(config, "num_nextn_predict_layers", 0, minimum=0),
        )


def _refuse_unsupported(config: Config) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise wrong("hidden_act", config["hidden_act"], "'silu', the only activation of this model")
    if boolean(config, "attention_bias", False):
        raise wrong("attention_bias", True, "false: attention with biases is not supported")


def _rope(config: Config, head_dim: int) -> tuple[float, int]:
    """(theta, rotated dimensions); `rope_scaling` goes before `rope_parameters`, as in transformers."""
    name = "rope_scaling" if mapping(config, "rope_scaling") else "rope_parameters"
    rope = mapping(config, name)
    kind_key = "type" if "type" in rope and "rope_type" not in rope else "rope_type"
    kind = rope.get(kind_key, "default")
    if kind != "default":
        raise wrong(f"{name}.{kind_key}", kind, "'default': scaled rotary embeddings are not supported")
    theta = _rope_number(config, rope, name, "rope_theta", 10_000.0)
    factor = _rope_number(config, rope, name, "partial_rotary_factor", 0.25)
    rotary_dim = int(head_dim * factor)
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        wanted = f"a share of head_dim ({head_dim}) that makes an even number from 2 to {head_dim}"
        raise wrong("partial_rotary_factor", factor, wanted)
    return theta, rotary_dim


def _rope_number(config: Config, rope: Config, name: str, key: str, default: float) -> float:
    if key in rope:
        return positive_number(rope, key, default, prefix=f"{name}.")
    return positive_number(config, key, default)


def _layer_types(config: Config, num_layers: int) -> tuple[str, ...]:
    types = config.get("layer_types")
    if types is None:
        interval = integer(config, "full_attention_interval", 4)
        return tuple(LAYER_TYPES[bool((layer + 1) % interval)] for layer in range(num_layers))
    if not isinstance(types, list | tuple) or len(types) != num_layers:
        raise wrong("layer_types", types, f"a list of num_hidden_layers ({num_layers}) names")
    for layer, kind in enumerate(types):
        if kind not in LAYER_TYPES:
            raise wrong(f"layer_types[{layer}]", kind, f"one of {list(LAYER_TYPES)}")
    return tuple(types)


def _sparse_layers(config: Config, num_layers: int, num_experts: int) -> tuple[int, ...]:
    step = integer(config, "decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list | tuple) or any(type(i) is not int or i < 0 for i in dense):
        raise wrong("mlp_only_layers", dense, "a list of layer indices")
    if num_experts == 0:
        return ()
    return tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)


def _experts_per_token(config: Config, num_experts: int) -> int:
    top_k = integer(config, "num_experts_per_tok", 10)
    if 0 < num_experts < top_k:
        raise wrong("num_experts_per_tok", top_k, f"at most num_experts ({num_experts})")
    return top_k
