"""`bench kernels`: the table with no GPU, the CPU's rows and limits, and what is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_kernels.device import DeviceProfile
from moe_runtime.bench.kernels import cpu, cpu_cases, cpu_limits
from moe_runtime.bench.kernels.cases import Case, turns_past_cache
from moe_runtime.bench.kernels.timing import Timing, in_turns, interleaved_medians
from moe_runtime.cli.main import main
from tests.kernels.implementations import IMPLEMENTATIONS
from tests.kernels.packing import assert_near
from tests.runtime.bench.figures import read_figure
from tests.runtime.bench.kernel_settings import OPERATIONS, small_setting

# --------------------------------------------------------------------------- --static


@pytest.mark.slow
def test_static_table_as_json(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    flags = ["--static", "--architectures", "90", "--json", "--save-result", str(file)]
    assert main(["bench", "kernels", *flags]) == 0

    out = capfd.readouterr().out
    assert json.loads(out) == json.loads(file.read_text())
    rows = json.loads(out)["results"]
    (delta,) = [row for row in rows if row["kernel"] == "gated_delta.decode"]
    assert delta["architecture"] == "sm_90"
    assert delta["spilled_bytes"] == 0
    assert delta["blocks_per_multiprocessor"] > 0
    assert delta["bytes_in_flight"] >= 32768
    # 32 sequences' states of 2 MB, read and written at 3.35 TB/s, whatever the expert-parallel size.
    assert delta["roofline_us"] == dict.fromkeys(("1", "8", "16", "32"), pytest.approx(40.3, abs=0.2))
    (scan,) = [row for row in rows if row["kernel"] == "gated_delta.scan"]
    assert scan["mma"] == "wgmma"


def test_static_table_as_text(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--static", "--architectures", "sm_90"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert any("NVIDIA H100 datasheet" in line for line in lines)
    (row,) = [line for line in lines[:-1] if "gated_delta.scan" in line]
    assert "wgmma, cp.async" in row
    assert json.loads(lines[-1])["benchmark"] == "kernels --static"


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tune"], "--tune needs a GPU, and this process sees none; --static needs none"),
        (["--device", "cuda"], "--device cuda needs a GPU, and this process sees none; --static needs none"),
        (["--device", "cpu", "--tune"], "--tune needs a GPU"),
        (["--device", "tpu"], "--device is 'tpu'; wanted cpu or cuda"),
        (["--static", "--device", "cpu"], "--device is not for --static"),
        (["--static", "--architectures", "91"], "--architectures has 91; known are 80, 89, 90, 100, 120"),
        (["--architectures", "90"], "--architectures is for --static"),
        (["--num-rounds", "0"], "--num-rounds must be at least 1, got 0"),
        (
            ["--static", "--plot", "k"],
            "--plot draws kernels' shares of their limits, which --static does not measure",
        ),
        (
            ["--tune", "--plot", "k"],
            "--plot draws kernels' shares of their limits, which --tune does not measure",
        ),
        (["--plot", "/nowhere/x"], "--plot /nowhere/x: give a prefix in a directory that exists"),
    ],
)
def test_one_line_and_status_2(
    flags: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels", *flags]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"moe-runtime: error: {message}")
    assert captured.err.count("\n") == 1


# --------------------------------------------------------------------------- on a CPU

needs_native = pytest.mark.skipif(
    IMPLEMENTATIONS == ["reference"], reason="this machine has no compiled kernels"
)
ROWS = (
    "experts decode",
    "experts prefill",
    "experts int8 decode",
    "experts int8 prefill",
    "linear N",
    "linear int8",
    *OPERATIONS,
)


@pytest.fixture
def small_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case and limit in sizes that take no time."""
    monkeypatch.setattr(cpu_cases, "_EXPERT_SIZES", ((12, 64, 32),))
    monkeypatch.setattr(cpu_cases, "_LINEAR", (96, 64))
    monkeypatch.setattr(cpu, "cpu_setting", lambda isa: small_setting(f"cpu:{isa}"))
    monkeypatch.setattr(cpu_limits, "_READ_BYTES", 1 << 16)
    monkeypatch.setattr(cpu_limits, "_MATRIX", 64)
    monkeypatch.setattr(cpu_limits, "cache_bytes", lambda: 1 << 16)


@needs_native
@pytest.mark.usefixtures("small_cpu")
def test_every_cpu_row_has_its_share_of_a_limit_and_torchs_time(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    saved = tmp_path_factory.mktemp("saved") / "result.json"
    files = ["--plot", str(tmp_path / "k"), "--save-result", str(saved)]
    assert main(["bench", "kernels", "--device", "cpu", "--num-rounds", "1", *files]) == 0
    lines = capfd.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert json.loads(saved.read_text()) == report
    assert report["workload"]["read_gb_per_s"] > 0
    assert report["workload"]["read_gb_per_s_all"] > 0
    assert report["workload"]["read_threads_all"] == len(os.sched_getaffinity(0))
    assert report["workload"]["sgemm_gflop_per_s"] > 0
    names = [row["kernel"] for row in report["results"]]
    assert [part for part in ROWS if not any(name.startswith(part) for name in names)] == []
    for row in report["results"]:
        amount = row["bytes"] if row["limit"] == "read bandwidth" else row["flops"]
        limit = (
            report["workload"]["read_gb_per_s"]
            if row["limit"] == "read bandwidth"
            else report["workload"]["sgemm_gflop_per_s"]
        )
        assert row["rate_per_s"] == pytest.approx(amount / row["ms"] * 1e3, rel=0.05)
        assert row["share"] == pytest.approx(row["rate_per_s"] / limit / 1e9, rel=0.05, abs=0.002)
        assert row["times_torch"] == pytest.approx(row["torch_ms"] / row["ms"], rel=0.05)
        assert row["torch"].startswith("F.linear" if row["kernel"].startswith("linear N") else "reference")
    (header,) = [line for line in lines if "share of it" in line]
    assert "times torch" in header
    assert {*names, "read bandwidth", "sgemm", "% of the limit"} <= read_figure(tmp_path / "k")


def cases_of(implementation: str, profile: DeviceProfile) -> list[Case]:
    return cpu_cases.all_cases(small_setting(implementation), profile)


@needs_native
@pytest.mark.usefixtures("small_cpu")
@pytest.mark.parametrize("instruction_sets", [("avx2", "fma"), ("avx512_bf16",)], ids=str)
def test_torch_computes_the_same_in_every_case(instruction_sets: tuple[str, ...]) -> None:
    profile = replace(DeviceProfile.query(), instruction_sets=instruction_sets)
    # Made twice, since both write states.
    ours, torchs = (cases_of(IMPLEMENTATIONS[1], profile) for _ in range(2))
    for case, other in zip(ours, torchs, strict=True):
        for ours_once, torch_once in zip(case.calls, other.torch_calls, strict=True):
            for got, wanted in zip(values_of(case, ours_once()), values_of(case, torch_once()), strict=True):
                assert_near(got, wanted.double())


def values_of(case: Case, result: Any) -> list[torch.Tensor]:
    """What can be compared: which of two equally probable experts is named first is open."""
    tensors = [result] if isinstance(result, torch.Tensor) else list(result)
    return tensors[1:] if case.name.startswith("routing") else tensors


@pytest.mark.usefixtures("small_cpu")
def test_torch_multiplies_in_float32_where_the_cpu_has_no_bfloat16_products() -> None:
    old = replace(DeviceProfile.query(), instruction_sets=("avx2", "fma", "avx512f"))
    ways = {
        case.torch_way for case in cases_of("reference", old) if case.name.startswith(("linear", "experts"))
    }
    assert ways == {"F.linear in float32", "reference in float32"}
    new = replace(old, instruction_sets=("avx2", "fma", "avx512f", "avx512_bf16"))
    assert {case.torch_way for case in cases_of("reference", new)} == {"F.linear", "reference"}


@pytest.mark.parametrize("part", ["decode", "prefill"])
def test_a_state_is_read_and_written_where_no_other_turn_does(part: str) -> None:
    setting = small_setting("reference")
    (case,) = [c for c in cpu_cases.mixer_cases(setting) if c.name.startswith(f"gated delta {part}")]
    seen: list[int] = []
    for call in case.torch_calls:
        seen += call.args[6].tolist()  # type: ignore[attr-defined]
    assert len(case.torch_calls) > 1
    assert len(set(seen)) == len(seen)


def test_inputs_come_again_only_after_four_caches_of_others() -> None:
    for size in (1, 999, 1000, 3999, 4000, 10**6):
        assert (turns_past_cache(size, 1000) - 1) * size >= 4000


@pytest.mark.parametrize("cache_mib", [32, 96, 384])
@pytest.mark.parametrize("tokens", [1, 8, 512])
def test_calls_touch_four_caches_of_experts_before_they_repeat(cache_mib: int, tokens: int) -> None:
    per_expert, cache = 3 * 256 * 1024 * 2, cache_mib << 20
    layers = cpu_cases.num_layers(512 * per_expert, cache)
    choices, touched = cpu_cases.choices_past_cache(tokens, 512, layers, 4 * cache / per_expert, 1)
    read = {(n % layers, e) for n, ids in enumerate(choices) for e in ids.flatten().tolist()}
    assert len(read) == touched
    assert len(read) * per_expert >= 4 * cache


def test_layers_of_experts_take_4_gib_at_most() -> None:
    layers = cpu_cases.num_layers(768 << 20, 2 << 30)
    assert layers == 5
    choices, touched = cpu_cases.choices_past_cache(8, 512, layers, 8 * 2**30 / (3 << 19), 1)
    assert 0.8 * 5 * 512 <= touched < 5 * 512
    assert len(choices) > layers


def test_many_threads_read_more_than_all_their_caches_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Four cores, of which two share a cache: three caches of 1 KB."""
    asked: list[tuple[int, int, int]] = []  # address, bytes, threads
    for core, sharers in enumerate(("0-1", "0-1", "2", "3")):
        cache = tmp_path / f"cpu{core}" / "cache" / "index3"
        cache.mkdir(parents=True)
        (cache / "shared_cpu_list").write_text(f"{sharers}\n")
    monkeypatch.setattr(cpu_limits, "CPUS", tmp_path)
    monkeypatch.setattr(cpu_limits, "_READ_BYTES", 1 << 10)
    monkeypatch.setattr(cpu_limits, "cache_bytes", lambda: 1 << 10)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr(
        cpu_limits,
        "native_function",
        lambda name, isa: lambda data, size, streams, ahead, threads: asked.append((data, size, threads)),
    )

    rate, num_threads = cpu_limits.read_bytes_per_s_of_all("avx2", 1)

    assert (num_threads, rate > 0) == (4, True)
    assert {threads for _, _, threads in asked} == {4}
    assert len({data for data, _, _ in asked}) * (1 << 10) >= 4 * 3 * (1 << 10)


@pytest.mark.parametrize(("num_threads", "num_bytes"), [(1, 1024), (8, 1024), (64, 8192)])
def test_threads_are_given_enough_to_read(
    num_threads: int, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_limits, "_READ_BYTES", 1 << 10)
    monkeypatch.setattr(cpu_limits, "cache_bytes", lambda: 1 << 10)
    monkeypatch.setattr(cpu_limits, "native_function", lambda name, isa: None)
    assert cpu_limits.read_calls("avx2", num_threads)[1] == num_bytes


def test_calls_take_turns() -> None:
    seen: list[str] = []
    call = in_turns([lambda: seen.append("a"), lambda: seen.append("b")])
    for _ in range(3):
        call()
    assert seen == ["a", "b", "a"]
    assert set(interleaved_medians({"x": lambda: sum(range(1000)), "y": call}, 2)) == {"x", "y"}


def test_a_slow_call_is_timed_in_as_many_rounds_as_its_budget_allows() -> None:
    now, order = [0.0], []

    def taking(name: str, seconds: float) -> Any:
        def call() -> None:
            now[0] += seconds
            order.append(name)

        return call

    calls = {
        name: taking(name, s) for name, s in {"free": 5.0, "fast": 0.25, "slow": 0.375, "huge": 9.0}.items()
    }
    timings = interleaved_medians(calls, 4, {"fast": 1.0, "slow": 1.0, "huge": 1.0}, clock=lambda: now[0])
    assert timings == {
        "free": Timing(5.0, 4),
        "fast": Timing(0.25, 4),
        "slow": Timing(0.375, 2),
        "huge": Timing(9.0, 1),
    }
    # The first of each is a trial; then rounds, each with whoever still takes part.
    assert order[4:10] == ["free", "fast", "slow", "huge", "free", "fast"]


@needs_native
def test_the_table_says_where_torch_was_timed_in_fewer_rounds() -> None:
    (case, *_) = cpu_cases.mixer_cases(small_setting(IMPLEMENTATIONS[1]))
    timings = {case.name: Timing(1e-3, 9), f"torch: {case.name}": Timing(0.5, 2)}
    result = cpu._result(case, timings, {"read bandwidth": 1e9, "sgemm": 1e9})
    assert cpu._torch_cells(result, 9) == ("500.00", "500.00", "reference, 2 of 9 rounds")
    assert cpu._torch_cells(result, 2) == ("500.00", "500.00", "reference")
    assert cpu._to_dict(result)["torch_rounds"] == 2
