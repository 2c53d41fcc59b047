"""A forward pass of a whole model on fake CUDA tensors: devices, dtypes and shapes, and nothing read back.

`bincount`, `.item()`, `.tolist()` and `nonzero` fail on fake tensors, as a captured graph would on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from moe_kernels.select import KernelPlan
from moe_models.interfaces import ExpertShard
from moe_models.qwen3_next import Qwen3NextForCausalLM
from moe_runtime.warmup import warm_up
from tests.checkpoints import BASE
from tests.models.fake_cuda import fake_cuda
from tests.models.model_harness import BLOCK_SIZE, Harness, build_model
from tests.models.triton_plan import triton_plan

EXPERTS = BASE["num_experts"]
DENSE = {"mlp_only_layers": list(range(BASE["num_hidden_layers"]))}
SPARSE: dict[str, Any] = {}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _fake_tensors() -> Iterator[None]:
    with fake_cuda():
        yield


def model_of(config: dict[str, Any], dtype: torch.dtype, plan: KernelPlan) -> Qwen3NextForCausalLM:
    full = {**BASE, "decoder_sparse_step": 1, "rms_norm_eps": 1e-6, "linear_conv_kernel_dim": 4, **config}
    return build_model(full, ExpertShard.whole(EXPERTS), dtype, plan, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [pytest.param(DENSE, id="dense"), pytest.param(SPARSE, id="sparse")])
def test_prefills_decodes_and_both(config: dict[str, Any], dtype: torch.dtype) -> None:
    harness = Harness(model_of(config, dtype, triton_plan()), device="cuda")
    steps = [{"a": [1] * 70, "b": [2] * 5}, {"a": [3], "b": [4]}, {"a": [5], "b": [6] * 66, "c": [7]}, {}]
    for tokens in steps:
        logprobs = harness.step(tokens)
        assert {name: len(ids) for name, ids in tokens.items()} == {
            n: x.shape[0] for n, x in logprobs.items()
        }
        for x in logprobs.values():
            assert x.device.type == "cuda"
            assert x.shape[1] == BASE["vocab_size"]


@pytest.mark.parametrize("config", [pytest.param(DENSE, id="dense"), pytest.param(SPARSE, id="sparse")])
def test_warm_up(config: dict[str, Any]) -> None:
    plan = triton_plan()
    harness = Harness(model_of(config, torch.bfloat16, plan), device="cuda")
    steps = warm_up(
        harness.model,
        harness.caches,
        plan,
        block_size=BLOCK_SIZE,
        num_local_experts=EXPERTS,
        device=torch.device("cuda"),
    )
    assert sum(step.amount for step in steps) == len(plan.warm_up_rows()) + 2


def test_a_read_back_is_found() -> None:
    harness = Harness(model_of({}, torch.bfloat16, KernelPlan.reference()), device="cuda")
    with pytest.raises(DynamicOutputShapeException, match="bincount"):
        harness.step({"a": [1, 2, 3]})


def test_a_tensor_on_the_wrong_device_is_found() -> None:
    harness = Harness(model_of(DENSE, torch.bfloat16, triton_plan()), device="cuda")
    harness.device = "cpu"
    with pytest.raises(RuntimeError, match="cpu"):
        harness.step({"a": [1, 2, 3]})
