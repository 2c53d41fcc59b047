"""What the model says about its checkpoint and itself, without any weight."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from moe_kernels.select import KernelPlan
from moe_models.interfaces import ExpertShard, KVCacheSpec, StateCacheSpec, WeightMap
from moe_models.local_dispatch import LocalDispatcher
from moe_models.qwen3_next import Qwen3NextForCausalLM
from tests.checkpoints import BASE


def build(shard: ExpertShard | None = None, **overrides: object) -> Qwen3NextForCausalLM:
    config = {**BASE, **overrides}
    shard = shard or ExpertShard.whole(int(config["num_experts"]))
    with torch.device("meta"):
        return Qwen3NextForCausalLM(config, shard, KernelPlan.reference())


def expert_sources(weights: WeightMap) -> set[int]:
    names = (load.source for load in weights.loads)
    return {int(name.split(".")[5]) for name in names if ".mlp.experts." in name}


def test_the_real_configuration_is_built_of_few_modules() -> None:
    real = {"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_experts": 512}
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(real, ExpertShard.whole(512), KernelPlan.reference())
    weights = model.weight_map(lambda name: False)
    # A module or a parameter for each of 24,576 experts would make building slow.
    assert len(list(model.modules())) < 1000
    assert len(list(model.parameters())) < 1000
    assert len(weights.expected) == 74391
    kinds: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        kinds[model.parameter_kind(name)] += parameter.numel()
    assert kinds["expert"] == 48 * 512 * 3 * 2048 * 512
    assert kinds["attention"] == 12 * (2048 * (2 * 4096 + 2 * 512) + 4096 * 2048 + 2 * 256)
    assert sum(kinds.values()) == 79_674_391_296


def test_a_shard_loads_its_own_experts_and_expects_all() -> None:
    weights = build(ExpertShard(8, (6, 1))).weight_map(lambda name: False)
    assert expert_sources(weights) == {1, 6}
    assert sum(".mlp.experts." in name for name in weights.expected) == 4 * 8 * 3


def test_the_fused_layout_is_read_in_runs_of_experts() -> None:
    weights = build(ExpertShard(8, (2, 3, 4, 7, 0, 1))).weight_map(lambda name: name.endswith("gate_up_proj"))
    assert weights.expected["model.layers.0.mlp.experts.gate_up_proj"] == (8, 48, 64)
    runs = [load for load in weights.loads if load.source == "model.layers.0.mlp.experts.down_proj"]
    assert [(load.source_index, load.target_index) for load in runs] == [
        ((slice(2, 5),), (slice(0, 3),)),
        ((slice(7, 8),), (slice(3, 4),)),
        ((slice(0, 2),), (slice(4, 6),)),
    ]


def test_every_parameter_is_loaded_by_somebody() -> None:
    for overrides in ({}, {"tie_word_embeddings": True, "mlp_only_layers": [0]}):
        model = build(**overrides)
        targets = {load.target for load in model.weight_map(lambda name: False).loads}
        assert targets == {name for name, _ in model.named_parameters()}


def test_a_tied_checkpoint_may_hold_an_output_projection() -> None:
    tied = build(tie_word_embeddings=True).weight_map(lambda name: True)
    untied = build().weight_map(lambda name: True)
    assert "lm_head.weight" in untied.expected
    assert "lm_head.weight" not in tied.expected
    assert r"lm_head\.weight" in tied.ignored
    assert r"lm_head\.weight" not in untied.ignored


def test_cache_specs_in_layer_order() -> None:
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(BASE, ExpertShard.whole(8), KernelPlan.reference())
    state = StateCacheSpec(
        conv_channels=96,
        conv_width=3,
        num_heads=4,
        key_size=8,
        value_size=16,
        conv_dtype=torch.float32,
    )
    kv = KVCacheSpec(num_kv_heads=2, head_size=16, dtype=torch.float32)
    assert model.cache_specs() == (state, state, state, kv)


def test_exponents_stay_float32_in_a_bfloat16_model() -> None:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = build()
    finally:
        torch.set_default_dtype(previous)
    in_float32 = {name.split(".")[-1] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert in_float32 == {"A_log", "dt_bias"}


def test_describe() -> None:
    facts = Qwen3NextForCausalLM.describe({**BASE, "mlp_only_layers": [1], "num_nextn_predict_layers": 1})
    assert facts.layer_types == ("linear_attention",) * 3 + ("full_attention",)
    assert facts.moe_layers == (0, 2, 3)
    assert (facts.num_experts, facts.num_experts_per_tok, facts.num_mtp_layers) == (8, 3, 1)


def test_a_shard_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shard is one of 4 experts; wanted num_experts .* \(8\)"):
        build(ExpertShard.whole(4))


def test_local_dispatch_maps_logical_to_local_experts() -> None:
    dispatcher = LocalDispatcher(ExpertShard(5, (4, 1)))
    x, ids, weights = torch.ones(2, 3), torch.tensor([[1, 4], [0, 1]]), torch.ones(2, 2)
    dispatched = dispatcher.dispatch(x, ids, weights)
    assert dispatched.local_ids_GK.tolist() == [[1, 0], [-1, 1]]
    assert dispatched.x_GH is x
    assert dispatcher.combine(x, dispatched) is x
