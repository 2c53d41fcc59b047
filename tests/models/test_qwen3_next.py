"""Qwen3-Next against transformers' own class on the same random checkpoints."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_kernels.device import DeviceProfile
from moe_kernels.libraries import available_libraries
from moe_kernels.select import KernelPlan, select
from moe_models.interfaces import Dispatched, ExpertShard
from moe_models.local_dispatch import LocalDispatcher
from moe_models.qwen3_next import Qwen3NextForCausalLM
from moe_runtime.building import kernel_shapes
from tests.checkpoints import (
    VARIANTS,
    load_reference,
    make_variant,
    reference_greedy,
    reference_logprobs,
    to_fused_layout,
)
from tests.kernels.implementations import IMPLEMENTATIONS
from tests.models.model_harness import Harness, load_model

# Largest difference of a log-probability in float32.
TOLERANCE = 1e-4
LENGTHS = {"a": 70, "b": 1, "c": 33, "d": 2}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    for variant in VARIANTS:
        make_variant(root / variant, variant)
    return {variant: root / variant for variant in VARIANTS}


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> tuple[Any, Path]:
    """transformers' model in float32, and the path of its checkpoint."""
    path = checkpoints[request.param]
    return load_reference(path), path


@pytest.fixture(params=IMPLEMENTATIONS)
def plan(request: pytest.FixtureRequest) -> KernelPlan:
    """Plain torch, and every copy of the compiled kernels that this machine runs: layers in one call."""
    return KernelPlan.uniform(request.param, "tested")


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, 199), k=length)


def assert_same_logprobs(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.shape == wanted.shape
    difference = (got - wanted).abs().max().item()
    assert difference <= TOLERANCE, f"log-probabilities differ by {difference:.1e}"


def test_prompts_of_different_lengths_in_one_batch(case: tuple[Any, Path], plan: KernelPlan) -> None:
    reference, path = case
    prompts = {name: prompt(length, seed) for seed, (name, length) in enumerate(LENGTHS.items())}
    got = Harness(load_model(path, plan=plan)).step(prompts)
    for name, ids in prompts.items():
        assert_same_logprobs(got[name], reference_logprobs(reference, ids))


def test_a_convolution_too_wide_for_layers_in_one_call(tmp_path: Path) -> None:
    make_variant(tmp_path, "base", linear_conv_kernel_dim=20)
    facts = Qwen3NextForCausalLM.describe(json.loads((tmp_path / "config.json").read_text()))
    shapes = kernel_shapes(facts, facts.num_experts, 128)
    plan = select(DeviceProfile.query("cpu"), shapes, torch.float32, libraries=available_libraries("cpu"))
    assert plan.blocks.implementation == "reference"
    ids = prompt(40)
    got = Harness(load_model(tmp_path, plan=plan)).step({"a": ids})
    assert_same_logprobs(got["a"], reference_logprobs(load_reference(tmp_path), ids))


def test_chunked_prefill_beside_decodes(case: tuple[Any, Path], plan: KernelPlan) -> None:
    reference, path = case
    harness = Harness(load_model(path, plan=plan), seed=1)
    ids = {"long": prompt(83, 1), "short": prompt(12, 2), "late": prompt(5, 3)}
    done: dict[str, list[torch.Tensor]] = {name: [] for name in ids}
    # Chunks of a token, fewer than the convolution's history, up to a delta-rule chunk and beyond.
    steps = [{"long": 5, "short": 2}, {"short": 1, "long": 66}, {"long": 2, "short": 1, "late": 1}]
    steps += [{"short": 1, "long": 1, "late": 4}, {"long": 9, "short": 7}]
    for sizes in steps:
        starts = {name: sum(map(len, done[name])) for name in sizes}
        step = {name: ids[name][starts[name] : starts[name] + size] for name, size in sizes.items()}
        for name, logprobs in harness.step(step).items():
            done[name].append(logprobs)
    for name, parts in done.items():
        assert_same_logprobs(torch.cat(parts), reference_logprobs(reference, ids[name]))


def test_greedy_decoding_step_by_step(case: tuple[Any, Path], plan: KernelPlan) -> None:
    reference, path = case
    harness = Harness(load_model(path, plan=plan))
    ids = {"a": prompt(17, 4), "b": prompt(3, 5)}
    tokens: dict[str, list[int]] = {name: [] for name in ids}
    step = ids
    for _ in range(24):
        step = {name: [int(logprobs[-1].argmax())] for name, logprobs in harness.step(step).items()}
        for name, chosen in step.items():
            tokens[name] += chosen
    for name, generated in tokens.items():
        assert generated == reference_greedy(reference, ids[name], 24)


def test_freed_slots_and_blocks_leave_no_trace(checkpoints: dict[str, Path]) -> None:
    harness = Harness(load_model(checkpoints["base"]))
    reference = load_reference(checkpoints["base"])
    for round_number in range(12):
        ids = prompt(9 + round_number, round_number)
        name = str(round_number)
        assert_same_logprobs(harness.step({name: ids})[name], reference_logprobs(reference, ids))
        harness.step({name: [1]})
        harness.finish(name)


def test_fused_layout_gives_the_same_model(case: tuple[Any, Path], tmp_path: Path) -> None:
    _, path = case
    to_fused_layout(path, tmp_path)
    for (name, ours), fused in zip(
        load_model(path).named_parameters(), load_model(tmp_path).parameters(), strict=True
    ):
        assert torch.equal(ours, fused), name


def test_a_step_without_tokens(checkpoints: dict[str, Path], plan: KernelPlan) -> None:
    assert Harness(load_model(checkpoints["base"], plan=plan)).step({}) == {}


# --------------------------------------------------------------------------- experts on two ranks


class Meeting:
    """Where the threads that play ranks exchange tensors: everybody leaves one, then everybody reads all."""

    def __init__(self, num_ranks: int) -> None:
        self.barrier = threading.Barrier(num_ranks, timeout=60)
        self.left: list[Any] = [None] * num_ranks

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.left[rank] = value
        self.barrier.wait()
        everybody = list(self.left)
        self.barrier.wait()
        return everybody


class MeetingDispatcher:
    """All tokens go to all ranks; each rank's partial sums come back and are added in rank order."""

    def __init__(self, meeting: Meeting, rank: int, shard: ExpertShard) -> None:
        self.meeting, self.rank, self.local = meeting, rank, LocalDispatcher(shard)

    def dispatch(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> Dispatched:
        everybody = self.meeting.exchange(self.rank, (x_TH, ids_TK, weights_TK))
        local = self.local.dispatch(*(torch.cat(parts) for parts in zip(*everybody, strict=True)))
        bounds = [0]
        for x, _, _ in everybody:
            bounds.append(bounds[-1] + x.shape[0])
        return Dispatched(
            x_GH=local.x_GH,
            local_ids_GK=local.local_ids_GK,
            weights_GK=local.weights_GK,
            handle=slice(bounds[self.rank], bounds[self.rank + 1]),
        )

    def combine(self, y_GH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        return sum(y[dispatched.handle] for y in self.meeting.exchange(self.rank, y_GH))


@pytest.mark.parametrize("variant", ["equal_heads_odd_experts", "dense_layers"])
def test_two_ranks_with_uneven_shards_agree_with_one(variant: str, checkpoints: dict[str, Path]) -> None:
    path = checkpoints[variant]
    num_experts = {"num_experts": 8, **VARIANTS[variant]}["num_experts"]
    # Neither contiguous nor equal.
    mine = [(0, 2, 3, 6), tuple(e for e in range(num_experts) if e not in (0, 2, 3, 6))]
    prompts = {"a": prompt(40, 1), "b": prompt(7, 2)}
    # The second rank has nothing in the first step, the first one nothing in the last.
    plans: list[list[dict[str, list[int]]]] = [
        [{"a": prompts["a"]}, {"a": [5]}, {}],
        [{}, {"b": prompts["b"]}, {"b": [9]}],
    ]
    meeting = Meeting(2)
    results: list[list[dict[str, torch.Tensor]]] = [[], []]

    def play(rank: int) -> None:
        shard = ExpertShard(num_experts, mine[rank])
        harness = Harness(load_model(path, shard), MeetingDispatcher(meeting, rank, shard))
        for step in plans[rank]:
            results[rank].append(harness.step(step))

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = results
    reference = load_reference(path)
    assert_same_logprobs(
        torch.cat([first[0]["a"], first[1]["a"]]), reference_logprobs(reference, [*prompts["a"], 5])
    )
    assert_same_logprobs(
        torch.cat([second[1]["b"], second[2]["b"]]), reference_logprobs(reference, [*prompts["b"], 9])
    )
    assert first[2] == second[0] == {}


# --------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("variant", ["base", "tied_no_renorm"])
def test_bfloat16_is_within_the_spread_of_transformers(variant: str, tmp_path: Path) -> None:
    make_variant(tmp_path, variant, seed=3, dtype=torch.bfloat16)
    exact, theirs_bf16 = load_reference(tmp_path), load_reference(tmp_path, torch.bfloat16)
    model = load_model(tmp_path, dtype=torch.bfloat16)
    ours, theirs = 0.0, 0.0
    for seed in range(6):
        ids = prompt(60, seed)
        wanted = reference_logprobs(exact, ids)
        theirs += (reference_logprobs(theirs_bf16, ids) - wanted).abs().mean().item()
        ours += (Harness(model).step({"a": ids})["a"] - wanted).abs().mean().item()
    assert theirs > 0
    assert ours <= 1.5 * theirs, f"mean error {ours / 6:.4f}, transformers' own is {theirs / 6:.4f}"
