"""After the warm-up no kernel is compiled: Triton is asked what it would compile, for a GPU that is not here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from moe_kernels.aot.driver import compile_only
from moe_kernels.device import DeviceProfile
from moe_kernels.grouped_gemm import fused_experts
from moe_kernels.quant import scale_shape
from moe_kernels.select import KernelPlan, select
from moe_kernels.shapes import KernelShapes
from moe_models.qwen3_next import Qwen3NextForCausalLM
from moe_runtime.building import kernel_shapes
from moe_runtime.warmup import warm_up
from tests.checkpoints import make_variant
from tests.models.model_harness import BLOCK_SIZE, Harness, load_model

H100 = DeviceProfile(
    kind="cuda",
    name="NVIDIA H100 80GB HBM3",
    total_memory=80 << 30,
    compute_capability=(9, 0),
    num_multiprocessors=132,
    shared_memory_per_block_optin=232448,
)
MAX_TOKENS = 20_000
# Prompts with and without context, of lengths that 16 divides and others, decodes beside them and alone.
SERVED = [
    {"a": [1] * 70, "b": [2] * 5},
    {"a": [3], "b": [4] * 16},
    {"a": [5], "b": [6], "c": [7] * 64},
    {"a": [8], "b": [9], "c": [1]},
    {"d": [2] * 3, "a": [3] * 33},
    {"a": [4]},
]


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """Names and keys of kernels as they are asked for; none is compiled, none runs, all results are zeros."""
    keys: set[tuple[str, str]] = set()

    def note(*, key: Any, fn: Any, **kwargs: Any) -> bool:
        keys.add((fn.name.rpartition(".")[2], str(key)))
        return True  # Triton takes that for a kernel that need not be launched

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # ids, which torch looks up
    with compile_only((9, 0)):
        yield keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["base", "equal_heads_odd_experts"])
def test_steps_of_every_kind_and_size_ask_for_nothing_new(
    variant: str, dtype: torch.dtype, tmp_path: Path, asked_for: set[tuple[str, str]]
) -> None:
    make_variant(tmp_path, variant)
    facts = Qwen3NextForCausalLM.describe(json.loads((tmp_path / "config.json").read_text()))
    shapes = kernel_shapes(facts, facts.num_experts, MAX_TOKENS)
    plan = select(H100, shapes, dtype, family="triton")
    harness = Harness(load_model(tmp_path, dtype=dtype, plan=plan))
    run_warm_up(harness, plan, facts.num_experts)
    warmed = set(asked_for)
    assert {"decode_kernel", "prefill_kernel", "gate_up_tiny", "gate_up"} <= {name for name, _ in warmed}
    for tokens in SERVED:
        harness.step(tokens)
    experts = harness.model.layers[0].mlp.experts
    for count in some_counts(MAX_TOKENS):
        ids = torch.zeros(count, shapes.top_k, dtype=torch.int64)
        experts(torch.zeros(count, shapes.hidden_size, dtype=dtype), ids, torch.zeros(ids.shape, dtype=dtype))
    assert asked_for == warmed


@pytest.mark.parametrize("max_tokens", [60, 3000, MAX_TOKENS])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_rows_of_the_warm_up_stand_for_all_others(
    weights: torch.dtype, max_tokens: int, asked_for: set[tuple[str, str]]
) -> None:
    shapes = KernelShapes(
        hidden_size=128,
        num_experts=60,
        num_local_experts=17,
        top_k=4,
        moe_intermediate_size=48,
        max_tokens=max_tokens,
        expert_dtype=weights,
    )
    plan = select(H100, shapes, torch.bfloat16)
    assert max(plan.warm_up_rows()) <= max_tokens
    run_experts(shapes, plan, torch.bfloat16, plan.warm_up_rows())
    warmed = set(asked_for)
    run_experts(shapes, plan, torch.bfloat16)
    assert asked_for == warmed


def test_a_size_that_was_left_out_is_found(asked_for: set[tuple[str, str]]) -> None:
    shapes = KernelShapes(
        hidden_size=64,
        num_experts=8,
        num_local_experts=8,
        top_k=2,
        moe_intermediate_size=32,
        max_tokens=MAX_TOKENS,
    )
    plan = select(H100, replace(shapes, max_tokens=100), torch.bfloat16)
    run_experts(shapes, plan, torch.bfloat16, plan.warm_up_rows())
    warmed = set(asked_for)
    run_experts(shapes, plan, torch.bfloat16)
    assert {name for name, _ in asked_for - warmed} == {"count", "lay_out", "scatter"}


def run_warm_up(harness: Harness, plan: KernelPlan, num_experts: int) -> None:
    steps = warm_up(
        harness.model,
        harness.caches,
        plan,
        block_size=BLOCK_SIZE,
        num_local_experts=num_experts,
        device=torch.device("cpu"),
    )
    assert sum(step.amount for step in steps)


def run_experts(
    shapes: KernelShapes, plan: KernelPlan, dtype: torch.dtype, rows: tuple[int, ...] | None = None
) -> None:
    """Steps of these numbers of rows at one layer's experts; of many numbers that may come if None."""
    local, hidden, inner = shapes.num_local_experts, shapes.hidden_size, shapes.moe_intermediate_size
    kept = shapes.expert_dtype or dtype
    weights = [torch.zeros(s, dtype=kept) for s in ((local, 2 * inner, hidden), (local, hidden, inner))]
    scales: list[torch.Tensor | None] = [None, None]
    if kept == torch.float8_e4m3fn:
        scales = [torch.zeros(scale_shape(weight.shape, kept)) for weight in weights]
    for count in rows or some_counts(shapes.max_tokens):
        ids = torch.zeros(count, shapes.top_k, dtype=torch.int64)
        x, chosen = torch.zeros(count, hidden, dtype=dtype), torch.zeros(ids.shape, dtype=dtype)
        launch = plan.grouped_gemm.launch
        fused_experts(x, ids, chosen, *weights, *scales, implementation="triton", launch=launch)


def some_counts(most: int) -> list[int]:
    """Numbers of rows up to `most`, small ones close together."""
    counts = (*range(1, 130, 3), *(2**i + 5 for i in range(7, 15)), MAX_TOKENS)
    return [count for count in counts if count <= most]
