"""What a rank runs before its first request, so that no kernel is compiled while it serves."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.select import Choice, KernelPlan
from moe_models.batch import ForwardBatch
from moe_models.interfaces import ExpertShard
from moe_models.qwen3_next import Qwen3NextForCausalLM
from moe_runtime.cache.pool import allocate
from moe_runtime.cache.sizing import CachePlan
from moe_runtime.errors import ConfigError
from moe_runtime.gpu_checks import require_triton
from moe_runtime.modelfiles import resolve_model
from moe_runtime.rank_spec import StartUpStep
from moe_runtime.warmup import warm_up

CPU = torch.device("cpu")
LOCAL = 8


class Plan(KernelPlan):
    """Plain torch that pretends to be compiled for three sizes."""

    def warm_up_rows(self) -> tuple[int, ...]:
        return (1, 5, 70)


def run(plan: KernelPlan) -> tuple[list[StartUpStep], list[ForwardBatch], list[int]]:
    config = resolve_model(None).config
    shard = ExpertShard(config["num_experts"], tuple(range(LOCAL)))
    model = Qwen3NextForCausalLM(config, shard, plan).float()
    for parameter in model.parameters():
        parameter.fill_(0.01)
    rows: list[int] = []
    batches: list[ForwardBatch] = []
    model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    model.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0]))
    # The fewest slots: of padding and one sequence.
    sizes = CachePlan(block_size=16, num_blocks=2, num_slots=2, bytes=0)
    caches = allocate(model.cache_specs(), sizes, CPU)
    steps = list(warm_up(model, caches, plan, block_size=16, num_local_experts=LOCAL, device=CPU))
    assert all(t.isfinite().all() for cache in caches for t in vars_of(cache))
    return steps, batches, rows


def vars_of(cache: object) -> list[torch.Tensor]:
    return [getattr(cache, name) for name in cache.__dataclass_fields__]  # type: ignore[attr-defined]


def test_every_size_at_the_experts_and_every_kind_of_sequence() -> None:
    steps, batches, rows = run(Plan.reference())
    assert rows[:3] == [1, 5, 70]
    assert rows[3:] == [batch.num_tokens for batch in batches[3:]]
    assert steps == [StartUpStep("compile", 0, 5), *[StartUpStep("compile", 1, 5)] * 5]
    decode, prompt, mixed = batches[0], batches[3], batches[4]
    assert (decode.num_decodes, decode.num_seqs) == (1, 1)
    assert (prompt.num_decodes, prompt.context_lens) == (0, (0,))
    assert mixed.num_decodes == 1
    assert min(mixed.context_lens) > 0
    assert mixed.state_checkpoints


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton has a driver for this machine's GPU")
def test_where_triton_cannot_start_the_way_out_is_said() -> None:
    with pytest.raises(
        ConfigError, match=r"^Triton cannot start here: .*active drivers.* gcc and python3-dev"
    ):
        require_triton()


def test_nothing_is_run_where_nothing_is_compiled() -> None:
    assert run(KernelPlan.reference())[:2] == ([StartUpStep("compile", 0, 0)], [])


def test_a_plan_with_one_compiled_kernel_is_warmed_up() -> None:
    reference = KernelPlan.reference()
    names = {name: getattr(reference, name) for name in KernelPlan.__dataclass_fields__}
    assert KernelPlan(**{**names, "norm": Choice("triton", "")}).warm_up_rows() == (1,)
