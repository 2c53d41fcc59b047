"""`bench latency`: times of a batch from a scripted timeline, a tiny run, bad input."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from moe_runtime.bench.latency import BatchTimes, LatencyWorkload, draw, summarise
from moe_runtime.cli.main import main
from tests.runtime.bench.figures import read_figure


def test_a_batch_is_split_into_its_first_tokens_and_the_later_ones() -> None:
    pieces = [(0.5, "a", 1), (0.7, "a", 2), (1.0, "b", 1), (1.2, "a", 1), (2.0, "b", 3), (2.5, "b", 0)]

    assert BatchTimes.of(pieces) == BatchTimes(
        latency_s=2.0,  # a piece without tokens only gives the reason for the end
        prefill_s=1.0,
        first_token_s=0.75,
        per_token_s=pytest.approx((0.7 / 3 + 1.0 / 3) / 2),
    )
    assert BatchTimes.of([(0.5, "a", 1)]).per_token_s is None


def test_percentiles_have_vllms_names() -> None:
    times = [
        BatchTimes(latency_s=s, prefill_s=s / 2, first_token_s=s / 4, per_token_s=None) for s in (1.0, 3.0)
    ]
    result = summarise(times)

    assert result["avg_latency"] == 2.0
    assert result["latencies"] == [1.0, 3.0]
    expected = {"10": 1.2, "25": 1.5, "50": 2.0, "75": 2.5, "90": 2.8, "99": 2.98}
    assert result["percentiles"] == pytest.approx(expected)
    assert (result["avg_prefill"], result["avg_first_token"]) == (1.0, 0.5)
    assert "avg_per_token" not in result


@pytest.mark.parametrize("per_token_s", [0.01, None])
def test_the_figure_has_bars_of_all_percentiles(per_token_s: float | None, tmp_path: Path) -> None:
    times = [
        BatchTimes(latency_s=s, prefill_s=s / 2, first_token_s=s / 4, per_token_s=per_token_s) for s in (1, 3)
    ]
    draw(summarise(times), asdict(LatencyWorkload(batch_size=3)), str(tmp_path / "l"))
    drawn = read_figure(tmp_path / "l")
    assert {
        "3 requests, 32 tokens in, 128 out, 10 batches: milliseconds",
        "batch",
        "avg",
        "10%",
        "99%",
    } <= drawn
    assert ("each later token" in drawn) == (per_token_s is not None)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_tiny_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    saved = tmp_path_factory.mktemp("saved") / "result.json"
    flags = ["--random-checkpoint", "tiny", "--dtype", "float32", "--threads-per-rank", "1"]
    flags += ["--batch-size", "3", "--input-len", "6", "--output-len", "5", "--plot", str(tmp_path / "l")]
    flags += ["--save-result", str(saved)]
    assert main(["bench", "latency", *flags, "--num-iters-warmup", "1", "--num-iters", "2"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    (result,) = report["results"]

    assert json.loads(saved.read_text()) == report
    assert (report["benchmark"], report["workload"]["batch_size"]) == ("latency", 3)
    assert len(result["latencies"]) == 2
    assert "each later token" in read_figure(tmp_path / "l")
    assert 0 < result["avg_first_token"] <= result["avg_prefill"] <= result["avg_latency"]
    assert 0 < result["avg_per_token"] <= result["avg_latency"] / 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--num-iters", "0"], "num_iters must be at least 1, got 0"),
        (["--num-iters-warmup", "-1"], "num_iters_warmup must be at least 0, got -1"),
        (["--save-result", "/nowhere/x"], "--save-result /nowhere/x: give a file"),
        (["--plot", "/nowhere/x"], "--plot /nowhere/x: give a prefix in a directory that exists"),
    ],
)
def test_bad_flags_are_refused_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "latency", *flags]) == 2
    assert message in capsys.readouterr().err
