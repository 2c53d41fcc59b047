"""A whole model on a GPU: its results, and that it neither waits for the GPU nor compiles while it serves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from moe_kernels.device import DeviceProfile
from moe_kernels.select import select
from moe_models.batch import ForwardBatch
from moe_models.qwen3_next import Qwen3NextForCausalLM
from moe_runtime.building import kernel_shapes
from moe_runtime.warmup import warm_up
from tests.checkpoints import make_variant
from tests.kernels.static.product_kernel import product_kernel
from tests.models.model_harness import BLOCK_SIZE, Harness, load_model
from tests.models.triton_model import check_mixed_steps, check_prompts

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16]
# Prompts with and without context, of lengths that 16 divides and others, decodes beside them and alone.
SERVED = [
    {"a": [1] * 70, "b": [2] * 5},
    {"a": [3], "b": [4] * 16},
    {"a": [5], "b": [6], "c": [7] * 64},
    {"a": [8], "b": [9], "c": [1]},
    {"d": [2] * 3, "a": [3] * 33},
    {"a": [4]},
]


@pytest.fixture(scope="module", params=["base", "equal_heads_odd_experts"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_variant(path, request.param)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("check", [check_prompts, check_mixed_steps], ids=lambda check: check.__name__)
def test_equals_the_references(check: Callable[..., None], dtype: torch.dtype, checkpoint: Path) -> None:
    check(checkpoint, "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_never_waits_for_the_gpu(
    dtype: torch.dtype, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = warm_harness(checkpoint, dtype)
    forward = harness.forward

    def without_waiting(batch: ForwardBatch) -> torch.Tensor:
        with synchronisation_is_an_error():
            return forward(batch)

    monkeypatch.setattr(harness, "forward", without_waiting)
    for tokens in SERVED:
        harness.step(tokens)


def test_waiting_for_the_gpu_would_be_found() -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), synchronisation_is_an_error():
        x.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_compiled_after_the_warm_up(
    dtype: torch.dtype, checkpoint: Path, compiled: list[str]
) -> None:
    harness = warm_harness(checkpoint, dtype)
    compiled.clear()
    for tokens in SERVED:
        harness.step(tokens)
    assert compiled == []


def test_a_compilation_would_be_found(compiled: list[str]) -> None:
    x, w, out = (torch.ones(16, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    product_kernel[(1,)](x, w, out, SIZE=16, DEPTH=16, PRECISION="ieee")
    assert compiled == ["product_kernel"]
    assert torch.equal(out, torch.full_like(out, 16))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that this process asks Triton for and has not asked for before, as they are asked for."""
    names: list[str] = []

    def note(*, repr: str, fn: Any, **kwargs: Any) -> None:
        names.append(fn.name.rpartition(".")[2])

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    return names


def warm_harness(checkpoint: Path, dtype: torch.dtype) -> Harness:
    """A harness with the plan that a rank on this GPU would choose, warmed up as a rank is."""
    facts = Qwen3NextForCausalLM.describe(json.loads((checkpoint / "config.json").read_text()))
    shapes = kernel_shapes(facts, facts.num_experts, max_tokens=256)
    plan = select(DeviceProfile.query("cuda"), shapes, dtype, family="triton")
    harness = Harness(load_model(checkpoint, dtype=dtype, plan=plan, device="cuda"), device="cuda")
    steps = warm_up(
        harness.model,
        harness.caches,
        plan,
        block_size=BLOCK_SIZE,
        num_local_experts=facts.num_experts,
        device=torch.device("cuda"),
    )
    assert sum(step.amount for step in steps)
    return harness


@contextmanager
def synchronisation_is_an_error() -> Iterator[None]:
    """Within the block, torch raises where the host would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
