"""Quantised copies of transformers' checkpoints, and what their codes stand for; nothing of ours computes them.

Every function takes and writes checkpoint folders: `rounded_*` ones hold float32 tensors that transformers can
load, with the values that the quantised weights stand for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import read_tensors, write_tensors

BLOCK = 128
FP8_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
}
# More than a block of rows and columns nearly everywhere, and a last block that is not full; whole blocks of
# each expert's gate and up.
LARGE_ENOUGH: dict[str, Any] = {
    "hidden_size": 160,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 136,
    "num_experts": 5,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 40,
    "num_hidden_layers": 4,
}

_LINEAR = r"model\.layers\.\d+\.(self_attn|linear_attn|mlp)\..*_proj(_qkvz|_ba)?\.weight"
_FUSED = r"model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj"


def is_int8(name: str) -> bool:
    """Whether the int8 mode quantises the tensor: linear layers, experts and the LM head, not routers and gates."""
    return name == "lm_head.weight" or re.fullmatch(f"{_LINEAR}|{_FUSED}", name) is not None


def is_fp8(name: str) -> bool:
    """Whether the official FP8 checkpoints hold the tensor as float8."""
    return is_int8(name) and name != "lm_head.weight" and "in_proj_ba" not in name


def rounded_int8(source: Path, target: Path) -> None:
    """Copy a checkpoint with the weights that int8 with a scale for each row stands for."""
    _rewrite(source, target, lambda name, weight: {name: _int8_values(weight) if is_int8(name) else weight})


def to_fp8(
    source: Path, target: Path, *, num_shards: int = 1, scale_dtype: torch.dtype = torch.float32
) -> None:
    """Copy a checkpoint into the official FP8 format."""

    def store(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if not is_fp8(name):
            return {name: weight}
        codes, scale = _fp8(weight, scale_dtype)
        return {name: codes, f"{name}_scale_inv": scale}

    _rewrite(source, target, store, num_shards=num_shards)
    file = target / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": FP8_CONFIG}))


def rounded_fp8(fp8: Path, target: Path, *, then_int8: bool = False) -> None:
    """Copy an FP8 checkpoint with the float32 weights that it stands for, rounded to int8 after that if wanted."""
    tensors = read_tensors(fp8)
    values = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = tensor.float() * _spread(tensors[f"{name}_scale_inv"].float(), tensor.shape)
        values[name] = _int8_values(tensor) if then_int8 and is_int8(name) else tensor
    write_tensors(fp8, target, values, num_shards=1)
    file = target / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]
    file.write_text(json.dumps(config))


def _rewrite(
    source: Path,
    target: Path,
    change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
    num_shards: int = 1,
) -> None:
    tensors = {}
    for name, tensor in read_tensors(source).items():
        tensors.update(change(name, tensor))
    write_tensors(source, target, tensors, num_shards=num_shards)


def _int8_values(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.float().abs().max(dim=-1, keepdim=True).values / 127
    return torch.round(weight.float() / scale) * scale


def _fp8(weight: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Block by block, as slowly as can be."""
    if weight.dim() == 3:
        pairs = [_fp8(expert, scale_dtype) for expert in weight]
        return torch.stack([codes for codes, _ in pairs]), torch.stack([scale for _, scale in pairs])
    num_rows, num_columns = (-(-size // BLOCK) for size in weight.shape)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(num_rows, num_columns, dtype=scale_dtype)
    for i in range(num_rows):
        for j in range(num_columns):
            block = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scale[i, j] = weight[block].float().abs().max() / 448
            codes[block] = (
                (weight[block].float() / scale[i, j].float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            )
    return codes, scale


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The scale of each element."""
    rows, columns = (torch.arange(size) // BLOCK for size in shape[-2:])
    return scale[..., rows[:, None], columns]
