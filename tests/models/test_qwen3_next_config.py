"""Reading config.json in both styles, with transformers' defaults, and refusing what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_models.qwen3_next_config import Qwen3NextConfig
from tests.checkpoints import BASE, VARIANTS, hub_style_config

L, F = "linear_attention", "full_attention"


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_styles_say_the_same(variant: str, tmp_path: Path) -> None:
    from transformers import Qwen3NextConfig as Theirs

    theirs = Theirs(**{**BASE, **VARIANTS[variant]})
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    parsed = Qwen3NextConfig.parse(saved)
    for field in ("vocab_size", "head_dim", "rms_norm_eps", "norm_topk_prob", "tie_word_embeddings"):
        assert getattr(parsed, field) == getattr(theirs, field)
    assert parsed.layer_types == tuple(theirs.layer_types)
    assert parsed.rope_theta == 1000.0
    assert parsed.rotary_dim == int(16 * theirs.rope_parameters["partial_rotary_factor"])
    if "layer_types" not in VARIANTS[variant]:
        assert Qwen3NextConfig.parse(hub_style_config(saved)) == parsed


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    from transformers import Qwen3NextConfig as Theirs

    theirs, parsed = Theirs(), Qwen3NextConfig.parse({})
    shared = [field for field in parsed.__slots__ if hasattr(theirs, field) and field != "layer_types"]
    assert len(shared) >= 18
    assert {name: getattr(parsed, name) for name in shared} == {n: getattr(theirs, n) for n in shared}
    assert parsed.layer_types == tuple(theirs.layer_types)
    assert parsed.rope_theta == theirs.rope_parameters["rope_theta"]
    assert parsed.rotary_dim == 256 * theirs.rope_parameters["partial_rotary_factor"]
    assert parsed.sparse_layers == tuple(range(48))


@pytest.mark.parametrize(
    ("config", "field", "wanted"),
    [
        ({"num_hidden_layers": 3, "full_attention_interval": 2}, "layer_types", (L, F, L)),
        ({"num_hidden_layers": 2, "layer_types": [F, L]}, "layer_types", (F, L)),
        ({"num_hidden_layers": 5, "layer_types": None}, "layer_types", (L, L, L, F, L)),
        ({"num_hidden_layers": 5, "decoder_sparse_step": 2}, "sparse_layers", (1, 3)),
        ({"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}, "sparse_layers", (1, 3)),
        ({"num_hidden_layers": 2, "mlp_only_layers": None}, "sparse_layers", (0, 1)),
        ({"num_hidden_layers": 2, "num_experts": 0}, "sparse_layers", ()),
        ({"rope_theta": 5000000}, "rope_theta", 5e6),
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}, "rope_theta", 2.0),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 7.0}, "rope_theta", 7.0),
        ({"rope_scaling": None, "partial_rotary_factor": 0.5}, "rotary_dim", 128),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}, "head_dim": 64}, "rotary_dim", 64),
        ({"quantization_config": None}, "num_mtp_layers", 0),
    ],
    ids=str,
)
def test_what_keys_mean(config: dict[str, Any], field: str, wanted: object) -> None:
    assert getattr(Qwen3NextConfig.parse(config), field) == wanted


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; wanted an integer of at least 1"),
        ({"hidden_size": "2048"}, "hidden_size is '2048'; wanted an integer"),
        ({"hidden_size": True}, "hidden_size is True; wanted an integer"),
        ({"vocab_size": None}, "vocab_size is None; wanted an integer"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06; wanted a number above 0"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; wanted true or false"),
        ({"num_experts": -1}, "num_experts is -1; wanted an integer of at least 0"),
        ({"num_experts": 8}, "num_experts_per_tok is 10; wanted at most num_experts (8)"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads is 16; wanted a multiple of num_key_value_heads (3)",
        ),
        (
            {"linear_num_key_heads": 5},
            "linear_num_value_heads is 32; wanted a multiple of linear_num_key_heads (5)",
        ),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1; wanted an integer of at least 2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; wanted 'silu'"),
        ({"attention_bias": True}, "attention_bias is True; wanted false"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling.rope_type is 'yarn'; wanted"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.type is 'linear'; wanted 'default'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type is 'llama3'; wanted"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]; wanted an object"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta is 0; wanted a number above 0"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; wanted a share of head_dim (256)"),
        ({"head_dim": 20}, "partial_rotary_factor is 0.25; wanted a share of head_dim (20)"),
        ({"layer_types": [F]}, "wanted a list of num_hidden_layers (48) names"),
        ({"num_hidden_layers": 1, "layer_types": ["mamba"]}, "layer_types[0] is 'mamba'; wanted one of"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers is [-1]; wanted a list of layer indices"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers is '0'; wanted a list of layer indices"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; wanted an integer of at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_values_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: ") as error:
        Qwen3NextConfig.parse(config)
    assert message in str(error.value)
