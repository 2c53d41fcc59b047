"""All layers in one call give what each gives in calls of its own, and its operations one after another."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from moe_kernels.quant import quantize_int8
from moe_kernels.select import Choice, KernelPlan
from moe_models.interfaces import ExpertShard, TokenDispatcher
from moe_models.layers.linear import Linear
from moe_models.layers.moe import Experts
from moe_models.local_dispatch import LocalDispatcher
from moe_models.qwen3_next import Qwen3NextForCausalLM
from moe_runtime.parallel.dispatch import ExpertLoad
from tests.checkpoints import make_variant
from tests.kernels.implementations import NATIVE
from tests.models.model_harness import Harness, load_model

pytestmark = pytest.mark.skipif(not NATIVE, reason="there is no compiled library for this machine")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_variant(path, "base")
    return path


class LayerByLayer(LocalDispatcher):
    """Wants to be asked at every layer."""

    one_call = None


def _run(
    model: Qwen3NextForCausalLM, new_dispatcher: Callable[[], TokenDispatcher] | None = None
) -> torch.Tensor:
    """Log-probabilities of two prompts, one in chunks beside the decodes of the other; a dispatcher a step."""
    order = random.Random(3)
    harness = Harness(model, seed=2)
    found = []
    for sizes in ({"a": 70}, {"a": 1, "b": 9}, {"a": 1, "b": 21}, {"a": 1, "b": 1}):
        if new_dispatcher is not None:
            harness.dispatcher = new_dispatcher()
        step = {name: order.choices(range(1, 199), k=size) for name, size in sizes.items()}
        found += [logprobs for _, logprobs in sorted(harness.step(step).items())]
    return torch.cat(found)


@pytest.mark.parametrize("weights", [None, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", NATIVE)
def test_one_call_or_many(
    implementation: str, dtype: torch.dtype, weights: torch.dtype | None, checkpoint: Path
) -> None:
    plan = KernelPlan.uniform(implementation, "tested")
    one_by_one = replace(plan, blocks=Choice("reference", "tested"))
    models = [load_model(checkpoint, dtype=dtype, plan=tried) for tried in (plan, one_by_one)]
    if weights is not None:
        for model in models:
            _quantize(model)
    at_once, in_operations = map(_run, models)
    assert not at_once.isnan().any()
    num_experts = models[0].config.num_experts
    layer_by_layer = _run(models[0], lambda: LayerByLayer(ExpertShard.whole(num_experts)))
    assert torch.equal(layer_by_layer, at_once)
    # The sigmoid of the shared expert's gate is the only thing that is not computed by the same code.
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(at_once, in_operations, rtol=0, atol=tolerance)


def test_a_token_outside_the_vocabulary_is_refused(checkpoint: Path) -> None:
    model = load_model(checkpoint, dtype=torch.float32, plan=KernelPlan.uniform(NATIVE[0], "tested"))
    size = model.config.vocab_size
    with pytest.raises(IndexError, match=rf"token ids from 0 to {size - 1} wanted, got \[1, {size}\]"):
        Harness(model, seed=2).step({"a": [1, size]})


def test_the_load_of_experts_is_counted_either_way(checkpoint: Path) -> None:
    model = load_model(checkpoint, plan=KernelPlan.uniform(NATIVE[0], "tested"))
    num_experts, counts = model.config.num_experts, []
    for kind in (LocalDispatcher, LayerByLayer):
        load = ExpertLoad(len(model.config.sparse_layers), num_experts, torch.device("cpu"))
        dispatcher = kind(ExpertShard.whole(num_experts))
        _run(model, partial(load.watch, dispatcher))
        counts.append(load.tokens_per_expert())
    assert torch.equal(*counts)
    assert counts[0].sum(-1).tolist() == [104 * model.config.num_experts_per_tok] * len(counts[0])


@pytest.mark.parametrize("wanted", [[], [0], [5, 11, 29], [29], list(range(30))])
@pytest.mark.parametrize("in_one_call", [True, False])
def test_wanted_tokens_come_as_they_do_among_all(
    wanted: list[int], in_one_call: bool, checkpoint: Path
) -> None:
    model = load_model(checkpoint, plan=KernelPlan.uniform(NATIVE[0], "tested"))
    shard = ExpertShard.whole(model.config.num_experts)
    local = LocalDispatcher if in_one_call else LayerByLayer
    prompts = {name: random.Random(name).choices(range(1, 199), k=15) for name in "ab"}
    found, loads = [], []
    for wanted_N in (None, torch.tensor(wanted, dtype=torch.int64)):
        load = ExpertLoad(len(model.config.sparse_layers), shard.num_experts, torch.device("cpu"))
        harness = Harness(model)
        for tokens, of_step in ((prompts, wanted_N), ({"a": [7], "b": [9]}, None)):
            harness.dispatcher = load.watch(local(shard))
            found.append(harness.forward(replace(harness.batch(tokens), wanted_N=of_step)))
        loads.append(load.tokens_per_expert().sum(1))
    whole, after_whole, some, after_some = found
    assert torch.equal(some, whole[wanted])
    assert torch.equal(after_some, after_whole)
    last = (len(wanted) if in_one_call else 30) + 2
    assert loads[1].tolist() == [*loads[0].tolist()[:-1], last * model.config.num_experts_per_tok]


def test_layers_without_experts_are_computed_one_by_one(tmp_path: Path) -> None:
    make_variant(tmp_path, "dense_layers")
    plan = KernelPlan.uniform(NATIVE[0], "tested")
    found = [
        _run(load_model(tmp_path, plan=tried))
        for tried in (plan, replace(plan, blocks=Choice("reference", "tested")))
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def _quantize(model: Qwen3NextForCausalLM) -> None:
    """Keep what the layers multiply with in int8."""
    for module in model.modules():
        names = {Linear: ("weight",), Experts: ("gate_up_proj", "down_proj")}.get(type(module), ())
        for name in names:
            kept, scale = quantize_int8(getattr(module, name))
            setattr(module, name, torch.nn.Parameter(kept, requires_grad=False))
            setattr(module, f"{name}_scale", torch.nn.Parameter(scale, requires_grad=False))
