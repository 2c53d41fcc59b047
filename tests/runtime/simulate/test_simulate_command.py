"""`moe-runtime simulate`: sweeps, validation, measured runs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_runtime.bench.checkpoint import preset_config
from moe_runtime.cli.main import main
from moe_runtime.simulate.measured_kernels import MeasuredExperts, read_measured_experts
from moe_runtime.simulate.published import FIGURES, TRENDS
from moe_runtime.simulate.step import PARTS
from moe_runtime.simulate.trace import write_trace
from moe_runtime.simulate.validate import compare


def _run(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[dict[str, Any], str]:
    """The JSON object of a run, and everything above it."""
    assert main(["simulate", *flags]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), "\n".join(lines)


def _refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["simulate", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_sweep(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    flags = ["--expert-parallel-sizes", "8,64,256", "--routing", "zipf:0.5", "--save-result", str(file)]
    report, shown = _run(capsys, *flags)

    assert json.loads(file.read_text()) == report
    assert report["benchmark"] == "simulate"
    assert [r["expert_parallel_size"] for r in report["results"]] == [8, 64, 256]
    for result in report["results"]:
        assert set(result["split"]) == set(PARTS)
        assert sum(result["split"].values()) == pytest.approx(1, abs=0.001)
        assert result["step_ms"] <= 50
        rate = result["batch_per_gpu"] / result["step_ms"] * 1e3
        assert result["tokens_per_s_per_gpu"] == pytest.approx(rate, rel=0.001)
        assert result["gains"]["perfect balance"] >= 1
    assert shown.startswith("Scaling breaks at EP 64")
    assert "What one change would gain" in shown


def test_1024_gpus_of_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    """Faster devices give more tokens/s, and the larger ones hold more sequences."""
    flags = ["--expert-parallel-sizes", "8,1024", "--dispatch", "deepep_normal"]
    reports = {
        gpu: [_run(capsys, "--gpu", gpu, *flags, *batch)[0] for batch in ((), ("--batch-per-gpu", "64"))]
        for gpu in ("H100", "H200", "B200")
    }

    for gpu, (free, fixed) in reports.items():
        assert free["workload"]["gpu"] == gpu
        for report in (free, fixed):
            assert [r["expert_parallel_size"] for r in report["results"]] == [8, 1024]
            large = report["results"][1]
            assert large["experts_per_gpu"] == 1
            assert large["tokens_per_s"] == pytest.approx(1024 * large["tokens_per_s_per_gpu"], rel=0.001)
            assert sum(large["split"].values()) == pytest.approx(1, abs=0.001)
            assert large["step_ms"] <= 50
    rates = [fixed["results"][1]["tokens_per_s_per_gpu"] for _, fixed in reports.values()]
    assert rates == sorted(set(rates))
    batches = [free["results"][1]["batch_per_gpu"] for free, _ in reports.values()]
    assert batches == sorted(set(batches))


def test_a_prefill_of_a_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(preset_config("peers-536m")))
    report, _ = _run(
        capsys, str(tmp_path), "--phase", "prefill", "--expert-parallel-sizes", "8", "--dtype", "bfloat16"
    )

    assert report["results"][0]["batch_per_gpu"] == 8192
    assert report["results"][0]["experts_per_gpu"] == 8


def test_a_trace_is_replayed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Everyone wants the first rank's experts."""
    choices = np.tile(np.arange(10), (64, 1))
    write_trace(tmp_path / "trace.npz", 512, [choices])
    flags = [
        "--expert-parallel-sizes",
        "8",
        "--batch-per-gpu",
        "64",
        "--routing",
        str(tmp_path / "trace.npz"),
    ]
    report, _ = _run(capsys, *flags)

    assert report["workload"]["routing"] == "trace.npz"
    assert report["results"][0]["imbalance"] == 8


def test_the_figure_is_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _run(capsys, "--expert-parallel-sizes", "8,16", "--plot", str(tmp_path / "scaling"))

    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "scaling.svg").read_text()


def test_sizes_at_which_nothing_runs_are_drawn_as_such(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    crosses = []
    for sizes in ("8,16", "8,1024"):
        report, _ = _run(capsys, "--expert-parallel-sizes", sizes, "--plot", str(tmp_path / "scaling"))
        stopped = [r["expert_parallel_size"] for r in report["results"] if r["step_ms"] is None]
        drawn = (tmp_path / "scaling.svg").read_text()  # texts are paths, with the words in comments
        crosses.append((stopped, "<!-- does not run: see the table's limit -->" in drawn))
        assert f"<!-- {sizes.split(',')[1]} -->" in drawn

    assert crosses == [([], False), ([1024], True)]


def test_at_most_one_published_figure_calibrates() -> None:
    assert sum(figure.calibrates for figure in FIGURES) <= 1
    comparisons, factor = compare()
    for c in comparisons:
        assert c.calibrated * factor == pytest.approx(c.predicted)
        if c.figure.calibrates:
            assert c.calibrated == pytest.approx(c.figure.tokens_per_s)
    assert compare([f for f in FIGURES if not f.calibrates])[1] == 1


def test_published_figures_fit_their_devices_and_say_what_they_assume() -> None:
    names = [figure.name for figure in FIGURES]
    assert len(set(names)) == len(names)
    for figure in FIGURES:
        assert figure.assumptions
        deployment = figure.deployment()
        if not figure.step.is_prefill:
            assert deployment.max_sequences(figure.step.context) >= figure.step.tokens
    assert all({over, under} <= set(names) for _, over, under in TRENDS)


def test_figures_that_no_source_prints_say_how_they_are_derived() -> None:
    """Sources print whole tokens/s of a node or a GPU."""
    derived = [figure for figure in FIGURES if figure.tokens_per_s * 8 % 1]

    assert [figure.name for figure in derived] == ["the same without two-batch overlap"]
    assert derived[0].tokens_per_s * 8 == pytest.approx(22_310 / 1.255)
    assert derived[0].assumptions.startswith(
        "derived: the source gives 22,310 tokens/s a node with overlap and a speedup of 25.5%, so 22,310 / 1.255; "
    )
    assert sum("derived" in figure.assumptions for figure in FIGURES) == 1


def test_validation_states_its_errors(capsys: pytest.CaptureFixture[str]) -> None:
    report, shown = _run(capsys, "--validate")

    assert len(report["results"]) == len(FIGURES)
    for result in report["results"]:
        ratio = result["predicted_tokens_per_s_per_gpu"] / result["published_tokens_per_s_per_gpu"]
        assert result["error"] == pytest.approx(ratio - 1, abs=0.001)
    for figure in FIGURES:
        assert f"{figure.name} ({figure.source}): {figure.assumptions}." in shown


def test_published_figures_are_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report, _ = _run(capsys, "--validate", "--plot", str(tmp_path / "validation"))

    assert (tmp_path / "validation.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "validation.svg").read_text()  # texts are paths, with the words in comments
    for result in report["results"]:
        assert f"<!-- {result['figure']} -->" in drawn
        for name in ("published", "predicted", "calibrated"):
            assert f"<!-- {result[f'{name}_tokens_per_s_per_gpu']:,.0f} -->" in drawn


def test_latencies_lengthen_the_exchanges_that_they_are_part_of(capsys: pytest.CaptureFixture[str]) -> None:
    def step_ms(ep_size: int, *flags: str) -> float:
        sizes = ("--expert-parallel-sizes", str(ep_size), "--batch-per-gpu", "8")
        return float(_run(capsys, *sizes, *flags)[0]["results"][0]["step_ms"])

    exchanges = 2 * 48  # dispatch and combine of each layer
    for ep_size, flag, more_us, times in (
        (8, "--exchange-us", 30 - 20, 1),
        (8, "--network-latency-us", 30 - 5, 0),
        (32, "--network-latency-us", 30 - 5, 3),  # one for each node but the first
    ):
        longer = step_ms(ep_size, flag, "30") - step_ms(ep_size)
        assert longer == pytest.approx(exchanges * times * more_us / 1e3, abs=0.02)


def test_measured_kernels_take_the_rooflines_place_where_they_were_measured(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    results = [
        {"tokens": tokens, "weights": "bfloat16", "implementation": name, "us": us}
        for tokens, us in ((8, 100.0), (512, 500.0))
        for name in ("moe_runtime", "loop")
    ]
    results.append({"kernel": "rotary", "implementation": "moe_runtime", "us": 1.0})  # no experts
    file.write_text(
        json.dumps({"benchmark": "kernels", "workload": {"local_experts": 64}, "results": results})
    )
    table = read_measured_experts([str(file)])
    # 8 tokens of all ranks are 10 rows on an eighth of the experts, 512 are 640.
    seconds = table.seconds(2048, 512, 64, 2.0, np.array([10.0, 325.0, 640.0]))

    assert seconds is not None
    assert seconds.tolist() == pytest.approx([100e-6, 300e-6, 500e-6])
    assert table.seconds(2048, 512, 64, 2.0, np.array([641.0])) is None
    assert table.seconds(2048, 512, 32, 2.0, np.array([10.0])) is None
    assert MeasuredExperts().seconds(2048, 512, 64, 2.0, np.array([10.0])) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "H10"], "--gpu must be one of H100, H200, B200, H800, got 'H10'; did you mean 'H100'?"),
        (["--dtype", "fp4"], "--dtype must be one of bfloat16, fp8, got 'fp4'; did you mean 'fp8'?"),
        (["--dispatch", "deepep"], "--dispatch must be one of"),
        (["--placement", "balance"], "got 'balance'; did you mean 'balanced'?"),
        (["--phase", "both"], "--phase must be decode or prefill, got 'both'"),
        (["--routing", "nowhere.npz"], "--routing must be uniform, zipf:SKEW or the path of a trace"),
        (["--expert-parallel-sizes", "8,12"], "expert_parallel_size=12 is no multiple of 8 GPUs a node"),
        (["--exchange-us", "0"], "--exchange-us must be above 0, got 0.0"),
        (["--network-latency-us", "-1"], "--network-latency-us must be above 0, got -1.0"),
        (["--network-gbps", "0"], "--network-gbps must be above 0, got 0.0"),
        (["--redundant-experts", "-1"], "--redundant-experts must be at least 0, got -1"),
        (["--batch-per-gpu", "0"], "--batch-per-gpu must be at least 1, got 0"),
        (["--tpot-slo-ms", "0"], "--tpot-slo-ms must be above 0, got 0.0"),
        (["qwen3-next"], "there is no preset 'qwen3-next'; did you mean 'qwen3-next-80b'?"),
        (["nowhere.json"], "no such directory: nowhere.json"),
        (["--validate", "--measured", "x.json"], "--validate has its own settings; leave --measured out"),
        (["--validate", "--gpu", "H200"], "--validate has its own settings; leave --gpu out"),
        (["deepseek-v3", "--validate"], "--validate has its own settings; leave MODEL out"),
        (
            ["--measured", "x.json", "--cpu-kernels", "y.json", "--overlap"],
            "--measured has its own settings; leave --overlap out",
        ),
        (
            ["--validate", "--plot", "/no/such/x"],
            "--plot /no/such/x: give a prefix in a directory that exists",
        ),
        (["--cpu-kernels", "x.json"], "--cpu-kernels goes with --measured"),
        (["--measured", "nowhere.json"], "nowhere.json cannot be read: No such file or directory"),
        (["--measured-kernels", "nowhere.json"], "nowhere.json cannot be read"),
        (
            ["--save-result", "/no/such/place"],
            "--save-result /no/such/place: give a file in a directory that exists",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in _refusal(capsys, *flags)


def test_an_unknown_flag_has_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["simulate", "--network-gbp", "400"])
    assert exit_info.value.code == 2
    assert "did you mean '--network-gbps'?" in capsys.readouterr().err


def test_models_of_other_architectures_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert "is a LlamaForCausalLM; simulate knows Qwen3NextForCausalLM" in _refusal(capsys, str(tmp_path))
