"""Small random Qwen3-Next checkpoints made by transformers, and what transformers computes with them.

Weights are drawn so that a mistake shows: norms away from their neutral value, decays slow enough for state
to matter (0.7 to 0.999 a token), sharp routers, logits of a few units.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

BASE: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "max_position_embeddings": 512,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000.0,
    "eos_token_id": 0,
}

# What each one differs in from BASE.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "equal_heads_odd_experts": {
        "vocab_size": 199,
        "hidden_size": 48,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "num_experts": 7,
        "num_experts_per_tok": 2,
    },
    "tied_no_renorm": {
        "vocab_size": 320,
        "tie_word_embeddings": True,
        "norm_topk_prob": False,
        "num_experts": 16,
        "num_experts_per_tok": 5,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-5,
    },
    "dense_layers": {
        "num_hidden_layers": 8,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "linear_num_value_heads": 6,
        "num_experts_per_tok": 1,
    },
    "mixed_layer_types": {
        "layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"],
        "partial_rotary_factor": 1.0,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 8,
    },
}


def make_checkpoint(
    path: str | Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config_overrides: Any
) -> Any:
    """Save a random checkpoint of BASE with `config_overrides` at `path`; return transformers' model."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    model = Qwen3NextForCausalLM(Qwen3NextConfig(**{**BASE, **config_overrides}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                _random_weight(name, parameter.shape, generator, model.config.tie_word_embeddings)
            )
    model = model.to(dtype).eval()
    model.save_pretrained(path)
    return model


def make_variant(
    path: str | Path, variant: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Any:
    """`make_checkpoint` for a name in VARIANTS."""
    return make_checkpoint(path, seed=seed, dtype=dtype, **{**VARIANTS[variant], **overrides})


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator, tied: bool) -> torch.Tensor:
    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    if name.endswith("A_log"):
        return uniform(0.1, 1.0).log()
    if name.endswith("dt_bias"):
        return uniform(-4.0, -1.5)
    if name.endswith("linear_attn.norm.weight"):
        return uniform(0.5, 1.5)
    if "norm" in name:
        return uniform(-0.4, 0.4)
    gain = {"mlp.gate": 2.0, "lm_head": 1.5, "embed_tokens": 2.0 if tied else 6.0}
    # A convolution's fan-in is its kernel, any other weight's its last dimension: the same thing.
    scale = next((g for part, g in gain.items() if f"{part}.weight" in name), 1.0) * shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * scale


# --------------------------------------------------------------------------- what transformers says


def load_reference(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a path, in `dtype`, with its plainest arithmetic; a model is returned as it is."""
    if not isinstance(model, str | Path):
        return model
    from transformers import Qwen3NextForCausalLM

    return Qwen3NextForCausalLM.from_pretrained(
        model, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@torch.inference_mode()
def reference_logprobs(
    model: Any, token_ids: Sequence[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """float32 log-probabilities [T, V] of what follows each token; `model` is a path or a loaded model."""
    logits = load_reference(model, dtype)(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


@torch.inference_mode()
def reference_greedy(model: Any, token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """The `num_tokens` most probable tokens after `token_ids`, one by one with a cache, past any end."""
    model = load_reference(model)
    step = torch.tensor([list(token_ids)])
    cache = None
    tokens: list[int] = []
    for _ in range(num_tokens):
        out = model(step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        tokens.append(int(out.logits[0, -1].argmax()))
        step = torch.tensor([tokens[-1:]])
    return tokens


# --------------------------------------------------------------------------- other layouts


def to_fused_layout(source: str | Path, target: str | Path) -> None:
    """Copy a checkpoint with each layer's experts stacked: gate_up_proj [E, 2F, H], down_proj [E, H, F]."""
    tensors = read_tensors(source)
    prefixes = sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name})
    for prefix in prefixes:
        experts = range(1 + max(int(n.split(".")[5]) for n in tensors if n.startswith(f"{prefix}.experts.")))
        parts = {
            part: [tensors.pop(f"{prefix}.experts.{e}.{part}_proj.weight") for e in experts]
            for part in ("gate", "up", "down")
        }
        pairs = zip(parts["gate"], parts["up"], strict=True)
        tensors[f"{prefix}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        tensors[f"{prefix}.experts.down_proj"] = torch.stack(parts["down"])
    write_tensors(source, target, tensors, num_shards=1)


def to_shards(source: str | Path, target: str | Path, num_shards: int = 3) -> None:
    """Copy a checkpoint into `num_shards` files with an index, as on the Hub."""
    write_tensors(source, target, read_tensors(source), num_shards=num_shards)


def hub_style_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same `config.json` as the Hub's files have it: flat rotary keys, an interval for the layer types.

    Only for layer types that an interval of 4 gives.
    """
    flat = {key: value for key, value in config.items() if key not in ("rope_parameters", "layer_types")}
    rope = config["rope_parameters"]
    flat.update(rope_theta=rope["rope_theta"], partial_rotary_factor=rope["partial_rotary_factor"])
    return {**flat, "rope_scaling": None, "full_attention_interval": 4}


def read_tensors(source: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(source).glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def write_tensors(
    source: str | Path, target: str | Path, tensors: dict[str, torch.Tensor], num_shards: int
) -> None:
    """Write a checkpoint of `tensors` with the other files of `source`; each name in turn into another shard."""
    from safetensors.torch import save_file

    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for file in Path(source).iterdir():
        if file.is_file() and "safetensors" not in file.name:
            shutil.copy(file, target)
    names = sorted(tensors)
    if num_shards == 1:
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(mine, target / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(mine, file_name))
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
