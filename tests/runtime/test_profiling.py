"""The step that GPU ranks measure before they size their caches."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_kernels.select import KernelPlan
from moe_models.interfaces import ExpertShard
from moe_models.layers import moe
from moe_models.qwen3_next import Qwen3NextForCausalLM
from moe_runtime.config import EngineConfig
from moe_runtime.modelfiles import resolve_model
from moe_runtime.profiling import WorstRoutingDispatcher, run_worst_step, work_space_bytes

RANKS, LOCAL = 4, 8


def _model(path: Path) -> Qwen3NextForCausalLM:
    config = resolve_model(path).config
    shard = ExpertShard(config["num_experts"], tuple(range(LOCAL)))
    model = Qwen3NextForCausalLM(config, shard, KernelPlan.reference()).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    return model


def test_every_ranks_tokens_reach_the_experts_of_this_one() -> None:
    model = _model(resolve_model(None).path)
    rows: list[int] = []
    for layer in model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
        layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: _all_local(inputs[1]))
    config = EngineConfig(max_num_batched_tokens=50, max_num_seqs=7)
    logits = run_worst_step(model, config, WorstRoutingDispatcher(RANKS, LOCAL), torch.device("cpu"))
    assert rows == [RANKS * 50] * len(model.layers)
    assert logits.shape == (7, model.config.vocab_size)
    assert work_space_bytes(model, config, RANKS, LOCAL, torch.device("cpu")) == 0


def _all_local(local_ids: torch.Tensor) -> None:
    assert int(local_ids.min()) >= 0
    assert int(local_ids.max()) < LOCAL


def test_a_large_receive_is_computed_in_parts_with_the_same_result(monkeypatch: object) -> None:
    generator = torch.Generator().manual_seed(0)
    experts = moe.Experts(16, 8, ExpertShard.whole(4), KernelPlan.reference())
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(53, 16, generator=generator)
    ids = torch.randint(-1, 4, (53, 3), generator=generator)
    weights = torch.rand(53, 3, generator=generator)
    whole = experts(x, ids, weights)
    monkeypatch.setattr(moe, "_MAX_ROWS", 10)  # type: ignore[attr-defined]
    torch.testing.assert_close(experts(x, ids, weights), whole, atol=1e-5, rtol=1e-5)
    assert experts(x[:0], ids[:0], weights[:0]).shape == (0, 16)
