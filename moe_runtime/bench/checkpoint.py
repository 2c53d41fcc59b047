"""Random Qwen3-Next checkpoints of a known size, in the Hub's names, to measure with."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moe_kernels.select import KernelPlan
from moe_models.interfaces import ExpertShard
from moe_models.qwen3_next import Qwen3NextForCausalLM
from moe_runtime.errors import ConfigError, did_you_mean
from moe_runtime.modelfiles import WEIGHTS_FILE

_COMMON: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "hidden_act": "silu",
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "partial_rotary_factor": 0.25,
    "rope_theta": 10_000_000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "eos_token_id": 0,
}
PRESETS: Mapping[str, dict[str, Any]] = {
    # 536 million parameters, about 120 million active a token.
    "peers-536m": {
        "vocab_size": 24_576,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "max_position_embeddings": 1024,
    },
}

# Weights are drawn so that the model behaves like a trained one: decays slow, routers sharp, logits of a few
# units. What a name matches first decides; other matrices have a standard deviation of their fan-in ** -0.5.
_UNIFORM = ((r"A_log", -2.3, 0.0), (r"dt_bias", -4.0, -1.5))
_AROUND_ONE = r"linear_attn\.norm\.weight"  # multiplies as it is
_AROUND_ZERO = r"norm\.weight"  # all others multiply as 1 + w
_GAINS = ((r"mlp\.gate\.weight", 2.0), (r"lm_head\.weight", 3.0), (r"embed_tokens\.weight", 16.0))


def make_random_checkpoint(path: str | Path, preset: str, seed: int = 0) -> Path:
    """Write config.json and model.safetensors of a preset, in bfloat16, into `path`; returns it.

    Raises:
        ConfigError: there is no preset of that name.
    """
    config = preset_config(preset)
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _random_weight(name, shape, generator).to(torch.bfloat16)
        for name, shape in sorted(tensor_shapes(config).items())
    }
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory


def preset_config(preset: str) -> dict[str, Any]:
    """The config.json of a preset.

    Raises:
        ConfigError: there is no preset of that name.
    """
    if preset not in PRESETS:
        raise ConfigError(
            f"there is no random checkpoint {preset!r}; wanted one of {', '.join(PRESETS)}"
            + did_you_mean(preset, PRESETS)
        )
    return {**_COMMON, **PRESETS[preset]}


def tensor_shapes(config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """Every tensor of a Qwen3-Next checkpoint, experts one by one, and its shape."""
    shard = ExpertShard.whole(config["num_experts"])
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config, shard, KernelPlan.reference())
    return model.weight_map(lambda name: False).expected


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Float32 values for a tensor of this name."""
    for pattern, low, high in _UNIFORM:
        if re.search(pattern, name):
            return torch.rand(shape, generator=generator) * (high - low) + low
    if re.search(_AROUND_ZERO, name):
        center = 1.0 if re.search(_AROUND_ONE, name) else 0.0
        return center + torch.randn(shape, generator=generator) * 0.1
    gain = next((gain for pattern, gain in _GAINS if re.search(pattern, name)), 1.0)
    return torch.randn(shape, generator=generator) * (gain * shape[-1] ** -0.5)
