"""Random checkpoints: the size that their name says, the Hub's names, and weights that behave."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from moe_runtime.bench.checkpoint import PRESETS, make_random_checkpoint, tensor_shapes


def test_the_peers_checkpoint_has_536_million_parameters() -> None:
    config = {"model_type": "qwen3_next", **PRESETS["peers-536m"]}
    count = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    assert count == 536_365_584
    assert tensor_shapes(config)["model.layers.11.mlp.experts.63.down_proj.weight"] == (768, 256)


def test_transformers_loads_every_tensor_and_its_logits_are_of_a_few_units(tmp_path: Path) -> None:
    from transformers import Qwen3NextForCausalLM

    path = make_random_checkpoint(tmp_path, "tiny")
    assert json.loads((path / "config.json").read_text())["architectures"] == ["Qwen3NextForCausalLM"]
    model, report = Qwen3NextForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.inference_mode():
        logits = model.eval()(torch.arange(32)[None]).logits
    assert 0.5 < float(logits.std()) < 10


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(tmp_path: Path) -> None:
    first, again, other = (
        load_file(make_random_checkpoint(tmp_path / str(number), "tiny", seed=seed) / "model.safetensors")
        for number, seed in enumerate((1, 1, 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
