"""Steps and searches: what must hold for any deployment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.simulate import search
from moe_runtime.simulate.deployment import Deployment
from moe_runtime.simulate.dispatch import KINDS, DispatchPlan
from moe_runtime.simulate.hardware import B200, H100, H200, Hardware, cpu_rank
from moe_runtime.simulate.measured_kernels import MeasuredExperts
from moe_runtime.simulate.mending import MENDINGS
from moe_runtime.simulate.models import deepseek_v3, qwen3_next_80b
from moe_runtime.simulate.routing import Layout, ZipfRouting
from moe_runtime.simulate.step import PARTS, Step, StepTime, step_time

DECODE = Step(tokens=128, context=2000)
PREFILL = Step(tokens=8192, context=2048, is_prefill=True)
STEPS = pytest.mark.parametrize("step", [DECODE, PREFILL], ids=["decode", "prefill"])
GPU_KINDS = [kind for kind in KINDS if kind != "shared_memory"]


def _deployment(
    ranks: int = 32, kind: str = "deepep_low_latency", skew: float = 0.4, **changes: Any
) -> Deployment:
    model = qwen3_next_80b()
    made = Deployment(
        model=model,
        hardware=H100,
        layout=Layout(num_ranks=ranks, ranks_per_node=8, placement="contiguous"),
        routing=ZipfRouting(model.num_experts, model.top_k, skew),
        dispatch=DispatchPlan(kind=kind, wire_dtype="bfloat16"),
    )
    return replace(made, **changes)


def _with(hardware: Hardware, path: str, factor: float) -> Hardware:
    """Hardware with one number multiplied; `path` is a field, or a link and its field."""
    name, _, inner = path.partition(".")
    value = getattr(hardware, name)
    changed = replace(value, **{inner: getattr(value, inner) * factor}) if inner else value * factor
    return replace(hardware, **{name: changed})


@STEPS
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", GPU_KINDS)
@pytest.mark.parametrize(
    "faster",
    ["scale_up.bytes_per_s", "scale_out.bytes_per_s", "bytes_per_s", "bf16_flops", "fp8_flops"],
)
def test_faster_hardware_is_never_slower(faster: str, kind: str, overlap: bool, step: Step) -> None:
    deployment = _deployment(kind=kind, overlap=overlap)
    seconds = [
        step_time(replace(deployment, hardware=_with(H100, faster, factor)), step).total
        for factor in (1, 2, 10)
    ]
    # Parts that an overlap hides are taken away again: rounding is all that may differ.
    assert seconds == pytest.approx(sorted(seconds, reverse=True), rel=1e-12)


@STEPS
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("skew", [0.0, 0.4, 1.0])
def test_perfect_balance_is_never_slower_and_waits_for_nobody(skew: float, overlap: bool, step: Step) -> None:
    deployment = _deployment(skew=skew, overlap=overlap)
    balanced = step_time(replace(deployment, perfect_balance=True), step)

    assert balanced.total <= step_time(deployment, step).total * (1 + 1e-12)
    assert balanced.waiting == pytest.approx(0, abs=1e-12)
    assert balanced.imbalance == pytest.approx(1)


@STEPS
def test_one_rank_exchanges_nothing(step: Step) -> None:
    time = step_time(_deployment(ranks=1), step)
    assert (time.dispatch, time.combine, time.waiting) == (0, 0, 0)
    assert step_time(_deployment(ranks=1, overlap=True), step) == time


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", GPU_KINDS)
def test_more_tokens_take_longer(kind: str, overlap: bool) -> None:
    deployment = _deployment(kind=kind, overlap=overlap)
    for tokens, step in (((8, 32, 128, 512), DECODE), ((2048, 8192, 32768), PREFILL)):
        seconds = [step_time(deployment, replace(step, tokens=n)).total for n in tokens]
        assert seconds == sorted(seconds)


@pytest.mark.parametrize("hardware", [H100, H200, B200, cpu_rank(1)])
def test_longer_contexts_take_longer(hardware: Hardware) -> None:
    deployment = _deployment(hardware=hardware)
    seconds = [step_time(deployment, replace(DECODE, context=n)).total for n in (100, 1000, 10_000)]
    assert seconds == sorted(seconds)


@STEPS
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", GPU_KINDS)
def test_the_parts_sum_to_the_step(kind: str, overlap: bool, step: Step) -> None:
    time = step_time(_deployment(kind=kind, overlap=overlap), step)
    assert sum(getattr(time, part) for part in PARTS) == pytest.approx(time.total)
    assert sum(time.split.values()) == pytest.approx(1)
    assert min(time.split.values()) >= -1e-12


def test_overlap_hides_no_more_than_there_is() -> None:
    """Two halves in turns take at least their computation, and at least their exchanges."""
    deployment = _deployment(ranks=64)
    half = step_time(deployment, replace(DECODE, tokens=64))
    whole = step_time(replace(deployment, overlap=True), DECODE)
    compute = 2 * (half.attention + half.experts + half.waiting)
    exchange = 2 * (half.dispatch + half.combine)

    assert whole.total - whole.other == pytest.approx(max(compute, exchange, (compute + exchange) / 2))


def test_exchanges_on_multiprocessors_slow_the_computation_beside_them() -> None:
    quiet, loud = (
        step_time(_deployment(ranks=8, kind=kind, overlap=True), DECODE)
        for kind in ("deepep_low_latency", "deepep_normal")
    )
    assert loud.attention > quiet.attention


def _measured(us_of_row: float, most_rows: float = 1e6) -> MeasuredExperts:
    """Of 64 local experts in fp8, as on a rank of eight: so many microseconds a row."""
    return MeasuredExperts({(64, 1.0): ((0.0, most_rows), (0.0, us_of_row * most_rows / 1e6))})


def test_measured_experts_take_the_rooflines_place_in_a_step() -> None:
    plain = _deployment(ranks=8)
    slow, slower = (step_time(replace(plain, measured=_measured(us)), DECODE) for us in (1.0, 2.0))
    routed = 48 * 128 * 10 * 1e-6  # layers, tokens of a rank, experts of a token, seconds a row

    assert slow.experts > step_time(plain, DECODE).experts
    assert slower.experts - slow.experts == pytest.approx(routed)
    assert slower.waiting - slow.waiting == pytest.approx(routed * (slow.imbalance - 1))
    for part in ("attention", "dispatch", "combine", "other"):
        assert getattr(slower, part) == getattr(step_time(plain, DECODE), part)


@pytest.mark.parametrize(
    ("ranks", "measured"), [(16, _measured(1.0)), (8, _measured(1.0, most_rows=128 * 10))]
)
def test_experts_that_were_not_measured_stay_on_the_roofline(ranks: int, measured: MeasuredExperts) -> None:
    """Other local experts than in the table, and a fullest rank with more rows than it has."""
    plain = _deployment(ranks=ranks)
    assert step_time(replace(plain, measured=measured), DECODE) == step_time(plain, DECODE)


def test_a_time_factor_scales_every_part() -> None:
    plain, slow = (step_time(_deployment(time_factor=f), DECODE) for f in (1.0, 1.5))
    assert slow.total == pytest.approx(1.5 * plain.total)
    assert slow.split == pytest.approx(plain.split)
    assert slow.imbalance == plain.imbalance


@pytest.mark.parametrize("name", list(MENDINGS))
def test_every_mending_gives_a_deployment_that_runs(name: str) -> None:
    assert isinstance(step_time(MENDINGS[name](_deployment()), DECODE), StepTime)


def test_the_search_finds_the_largest_batch_in_time() -> None:
    deployment = _deployment(ranks=64)
    found = search.decode(deployment, 2000, 1000, tpot_s=0.03)

    assert found.limited_by == "TPOT"
    assert found.tpot_s <= 0.03
    assert search.decode(deployment, 2000, 1000, batch=found.batch + 1).tpot_s > 0.03
    assert found.tokens_per_s == pytest.approx(found.batch / found.tpot_s)


def test_memory_limits_the_batch() -> None:
    deployment = _deployment(ranks=8)
    found = search.decode(deployment, 2000, 1000)
    model = deployment.model
    used = deployment.weight_bytes + found.batch * model.sequence_bytes(3000)

    assert found.limited_by == "memory"
    assert used <= 0.9 * 80e9 < used + model.sequence_bytes(3000)
    asked = search.decode(deployment, 2000, 1000, batch=found.batch + 1)
    assert asked.batch == 0
    assert f"memory holds {found.batch} sequences" in asked.limited_by


def test_what_does_not_fit_is_said() -> None:
    model = deepseek_v3()
    layout = Layout(num_ranks=8, ranks_per_node=8)
    deployment = _deployment(model=model, layout=layout, routing=ZipfRouting(256, 8))
    found = search.decode(deployment, 2000, 1000)

    assert (found.batch, found.tokens_per_s, found.time) == (0, 0.0, None)
    assert found.limited_by == "weights need 100.8 GB a rank, 72.0 GB are usable"


def test_a_target_that_nothing_meets_is_said() -> None:
    found = search.decode(_deployment(), 2000, 1000, tpot_s=0.001)
    assert found.batch == 0
    assert "a step of one sequence takes" in found.limited_by


def test_more_ranks_than_experts_need_copies() -> None:
    deployment = _deployment(ranks=1024)
    assert deployment.experts_per_rank == 1
    assert deployment.layout.place(ZipfRouting(512, 10).expert_rates).copies.sum() == 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": 0}, "expert_parallel_size must be from 1 to 4096, got 0"),
        ({"ranks": 12}, "expert_parallel_size=12 is no multiple of 8 GPUs a node"),
        ({"memory_utilization": 1.5}, "memory_utilization must be above 0 and at most 1, got 1.5"),
    ],
)
def test_bad_deployments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _deployment(**changes)


def test_bad_dispatches_are_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"--dispatch must be one of .*; did you mean 'all_gather'\?"):
        DispatchPlan(kind="allgather")
    with pytest.raises(ConfigError, match="--dispatch-dtype must be one of bfloat16, fp8, got 'fp4'"):
        DispatchPlan(kind="all_gather", wire_dtype="fp4")
