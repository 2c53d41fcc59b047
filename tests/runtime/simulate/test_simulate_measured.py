"""Measured runs on CPUs beside predictions: both benchmarks' files, errors, ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.cli.main import main
from moe_runtime.errors import ConfigError
from moe_runtime.simulate.hardware import CPU_THREAD, Hardware, cpu_rank
from moe_runtime.simulate.measured_kernels import read_cpu_thread
from moe_runtime.simulate.measured_points import read_points
from moe_runtime.simulate.measured_runs import predict
from moe_runtime.simulate.step import PARTS

_WORKLOAD = {"model": "/that/is/gone/peers-536m", "dtype": "bfloat16", "input_len": 128, "output_len": 32}


def _save(file: Path, benchmark: str, workload: dict[str, Any], results: list[dict[str, Any]]) -> str:
    hardware = {"device": "AMD EPYC (2 cores)", "load_average_before": 0.5}
    file.write_text(
        json.dumps(
            {
                "benchmark": benchmark,
                "hardware": hardware,
                "workload": {**_WORKLOAD, **workload},
                "results": results,
            }
        )
    )
    return str(file)


def _throughput(folder: Path, ranks: int, threads: int, rates: dict[int, float], **changes: Any) -> str:
    workload = {"expert_parallel_size": ranks, "threads_per_rank": threads, **changes}
    results = [{"concurrency": n, "output_tokens_per_s": rate} for n, rate in rates.items()]
    return _save(folder / f"ep{ranks}-{threads}.json", "throughput", workload, results)


def _scaling(folder: Path) -> str:
    """What `bench scaling --mode both --same-cores` writes: the one rank of two threads has rates of its own."""
    results = [
        {
            "mode": mode,
            "phase": phase,
            "expert_parallel_size": ranks,
            "threads_per_rank": [threads] * ranks,
            "same_cores_as": 2 if threads == 2 else None,
            "requests": requests,
            "tokens_per_s": 160.0 if threads == 2 else 100.0 * ranks,
            "parts_ms_of_step": {**dict.fromkeys(PARTS, 5.0), "outside": 1.0},
        }
        for mode, grown in (("strong", 32), ("weak", 64))
        for phase in ("prefill", "decode")
        for ranks, threads, requests in ((1, 1, 32), (2, 1, grown), (1, 2, grown))
    ]
    return _save(folder / "scaling.json", "scaling", {}, results)


def _rate(file: str, thread: Hardware = CPU_THREAD) -> float:
    (point,) = read_points([file])
    return predict(point, thread).tokens_per_s


def _report(capsys: pytest.CaptureFixture[str], *files: str) -> tuple[list[Any], list[Any], str]:
    """Points, ratios, and the text above the JSON object."""
    assert main(["simulate", "--measured", *files]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)["results"]
    return [r for r in results if "error" in r], [r for r in results if "ratio" in r], "\n".join(lines)


def test_throughput_at_two_sizes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = [
        _throughput(tmp_path, 1, 2, {8: 60.0, 32: 80.0}),
        _throughput(tmp_path, 2, 1, {8: 54.0, 32: 88.0}),
    ]
    points, ratios, shown = _report(capsys, *files)

    assert [(p["expert_parallel_size"], p["requests"]) for p in points] == [(1, 8), (1, 32), (2, 8), (2, 32)]
    for p in points:
        ratio = p["predicted_tokens_per_s"] / p["measured_tokens_per_s"]
        assert p["error"] == pytest.approx(ratio - 1, abs=0.001)
    assert [(r["ratio"], r["mode"], r["requests"], r["measured"]) for r in ratios] == [
        ("EP2/EP1", "strong", 8, 0.9),
        ("EP2/EP1", "strong", 32, 1.1),
    ]
    predicted = points[2]["predicted_tokens_per_s"] / points[0]["predicted_tokens_per_s"]
    assert ratios[0]["predicted"] == pytest.approx(predicted, abs=0.001)
    assert "Scaling" in shown


def test_scaling_is_compared_phase_by_phase_and_part_by_part(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    points, ratios, shown = _report(capsys, _scaling(tmp_path))

    assert [p["phase"] for p in points] == [*["prefill"] * 3, *["decode"] * 3] * 2
    assert set(points[0]["predicted_parts_ms"]) == set(PARTS)
    assert points[3]["predicted_parts_ms"]["dispatch"] == 0
    assert points[4]["predicted_parts_ms"]["dispatch"] > 0
    assert [(r["phase"], r["mode"], r["requests"], r["measured"]) for r in ratios if "EP" in r["ratio"]] == [
        ("prefill", "strong", 32, 2),
        ("decode", "strong", 32, 2),
        ("prefill", "weak", 64, 2),
        ("decode", "weak", 64, 2),
    ]
    assert "Parts of a step, ms: measured / predicted" in shown


def test_ranks_are_compared_with_one_rank_of_their_threads(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    points, ratios, shown = _report(capsys, _scaling(tmp_path))
    of_cores = [r for r in ratios if r["ratio"] == "2 ranks / one rank of 2 threads"]

    assert [(r["mode"], r["phase"], r["requests"], r["measured"]) for r in of_cores] == [
        ("same cores", phase, requests, 1.25) for requests in (32, 64) for phase in ("prefill", "decode")
    ]
    two, one = (p["predicted_tokens_per_s"] for p in points[1:3])
    assert of_cores[0]["predicted"] == pytest.approx(two / one, abs=0.001)
    assert "2 ranks / one rank of 2 threads, same cores, decode, 64 requests" in shown


@pytest.mark.parametrize("benchmark", ["scaling", "throughput"])
def test_measured_runs_are_drawn(benchmark: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = _scaling(tmp_path) if benchmark == "scaling" else _throughput(tmp_path, 1, 2, {8: 60.0})
    points, ratios, _ = _report(capsys, file, "--plot", str(tmp_path / "measured"))

    assert (tmp_path / "measured.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "measured.svg").read_text()  # texts are paths, with the words in comments
    for phase in {p["phase"] for p in points}:
        assert f"<!-- {phase}: measured and predicted -->" in drawn
    assert ("<!-- Scaling: measured and predicted -->" in drawn) == bool(ratios)
    for p in points:
        for name in ("measured", "predicted"):
            assert f"<!-- {p[f'{name}_tokens_per_s']:,.1f} -->" in drawn
    for r in ratios:
        assert f"<!-- {r['predicted']:.2f} -->" in drawn


def test_decode_is_slower_than_prefill_and_a_batch_is_both(tmp_path: Path) -> None:
    prefill, _, _, decode, *_ = read_points([_scaling(tmp_path)])
    batch = _rate(_throughput(tmp_path, 1, 1, {32: 1.0}))
    prefill_s = 32 * 128 / predict(prefill).tokens_per_s
    decode_s = 31 * 32 / predict(decode).tokens_per_s

    assert predict(prefill).tokens_per_s > predict(decode).tokens_per_s
    assert batch == pytest.approx(32 * 32 / (prefill_s + decode_s))


def test_more_threads_are_faster_and_the_slowest_rank_decides(tmp_path: Path) -> None:
    assert _rate(_throughput(tmp_path, 1, 2, {8: 1.0})) > _rate(_throughput(tmp_path, 1, 1, {8: 1.0}))
    seven, eight = (_rate(_throughput(tmp_path, 2, 1, {n: 1.0})) for n in (7, 8))
    assert seven == pytest.approx(eight * 7 / 8)


def test_a_cpu_of_ones_own(tmp_path: Path) -> None:
    workload = {"read_gb_per_s": 10.0, "sgemm_gflop_per_s": 50.0}
    thread = read_cpu_thread(_save(tmp_path / "kernels.json", "kernels", workload, []))

    assert (thread.bytes_per_s, thread.bf16_flops) == (10e9, 50e9)
    file = _throughput(tmp_path, 1, 1, {8: 1.0})
    assert _rate(file, thread) < _rate(file)
    assert thread.efficiency == CPU_THREAD.efficiency  # nothing was measured


def _cpu_kernels(folder: Path, **of_all: float) -> str:
    workload = {"read_gb_per_s": 26.0, "sgemm_gflop_per_s": 87.5, **of_all}
    return _save(folder / "kernels.json", "kernels", workload, [])


@pytest.mark.parametrize(
    ("of_all", "ranks", "threads", "gb_per_s"),
    [
        ({"read_gb_per_s_all": 31.0}, 1, 1, 26.0),
        ({"read_gb_per_s_all": 31.0}, 1, 2, 31.0),
        ({"read_gb_per_s_all": 31.0}, 2, 1, 15.5),
        ({"read_gb_per_s_all": 31.0}, 2, 2, 15.5),
        ({"read_gb_per_s_all": 60.0}, 2, 1, 26.0),
        ({"read_gb_per_s_all": 25.5}, 1, 1, 26.0),  # of a single core, by the other clock
        ({}, 2, 2, 52.0),
    ],
)
def test_ranks_of_a_host_share_what_its_memory_gives(
    of_all: dict[str, float], ranks: int, threads: int, gb_per_s: float, tmp_path: Path
) -> None:
    thread = read_cpu_thread(_cpu_kernels(tmp_path, **of_all))
    assert cpu_rank(threads, thread, ranks_on_host=ranks).bytes_per_s == pytest.approx(gb_per_s * 1e9)
    assert cpu_rank(threads, thread, ranks_on_host=ranks).bf16_flops == pytest.approx(threads * 87.5e9)


def test_decode_of_two_threads_is_slower_where_they_share_memory(tmp_path: Path) -> None:
    """A decode step reads, so that neither ranks nor threads help beyond what memory gives."""
    points = [p for p in read_points([_scaling(tmp_path)]) if p.phase == "decode" and p.requests == 32]
    free, shared = (
        [predict(p, read_cpu_thread(_cpu_kernels(tmp_path, **of_all))).tokens_per_s for p in points]
        for of_all in ({}, {"read_gb_per_s_all": 26.0})
    )
    one, two_ranks, two_threads, _ = range(4)
    assert shared[one] == free[one]
    assert shared[two_ranks] < 0.8 * free[two_ranks]
    assert shared[two_threads] < 0.8 * free[two_threads]


@pytest.mark.parametrize(
    ("of_all", "said"),
    [
        ({"read_gb_per_s_all": 31.0}, "at most 31.0 GB/s for all threads together"),
        ({}, "no limit on all threads together: read_gb_per_s_all was not measured"),
    ],
)
def test_what_memory_is_taken_to_give_is_said(
    of_all: dict[str, float], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = _cpu_kernels(tmp_path, **of_all)
    assert main(["simulate", "--measured", _scaling(tmp_path), "--cpu-kernels", file]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["workload"]["memory"] == said


def test_what_kernels_reach_on_ones_own_cpu(tmp_path: Path) -> None:
    workload = {"read_gb_per_s": 10.0, "sgemm_gflop_per_s": 50.0}
    shares = {
        "experts decode E=128 H=2048 F=512 T=1": 0.9,
        "experts decode E=512 H=1024 F=256 T=8": 0.7,
        "linear N=12288 K=2048 T=1": 0.95,
        "linear N=12288 K=2048 T=512": 2.25,
        # Of other weights, and of other parts: no share of these.
        "linear int8 N=12288 K=2048 T=1": 0.1,
        "linear int8 N=12288 K=2048 T=512": 0.1,
        "experts int8 decode E=128 H=2048 F=512 T=1": 0.1,
        "experts int8 prefill E=128 H=2048 F=512 T=512": 0.1,
        "gated delta prefill T=512": 0.1,
    }
    results = [{"kernel": kernel, "share": share} for kernel, share in shares.items()]
    reached = read_cpu_thread(_save(tmp_path / "kernels.json", "kernels", workload, results)).efficiency
    assert reached.grouped_bytes == pytest.approx(0.8)
    assert (reached.gemm_bytes, reached.gemm_flops) == (0.95, 2.25)
    assert reached.grouped_flops == CPU_THREAD.efficiency.grouped_flops
    assert reached.stream_bytes == CPU_THREAD.efficiency.stream_bytes


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    overhead = _save(tmp_path / "overhead.json", "overhead", {}, [])
    with pytest.raises(
        ConfigError, match="is of benchmark 'overhead'; wanted a file of `bench throughput --save"
    ):
        read_points([overhead])
    with pytest.raises(ConfigError, match="dtype must be one of float32, bfloat16, float16, got 'int4'"):
        read_points([_throughput(tmp_path, 1, 1, {8: 1.0}, dtype="int4")])
    (tmp_path / "text.json").write_text("no JSON")
    with pytest.raises(ConfigError, match="is no JSON file"):
        read_points([str(tmp_path / "text.json")])


def test_runs_on_gpus_are_refused(tmp_path: Path) -> None:
    file = Path(_throughput(tmp_path, 1, 1, {8: 1.0}))
    file.write_text(file.read_text().replace("AMD EPYC (2 cores)", "NVIDIA H100 80GB HBM3"))
    with pytest.raises(
        ConfigError, match="was measured on NVIDIA H100 80GB HBM3; --measured compares CPU ranks"
    ):
        read_points([str(file)])
