"""`bench throughput`: token counts add up, bad input is refused at once."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from moe_runtime.bench import throughput
from moe_runtime.bench.throughput import ThroughputWorkload
from moe_runtime.cli.main import main
from moe_runtime.errors import ConfigError
from tests.runtime.bench.figures import read_figure


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_tiny_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    saved = tmp_path_factory.mktemp("saved") / "result.json"
    flags = ["--random-checkpoint", "tiny", "--dtype", "float32", "--threads-per-rank", "1"]
    flags += ["--concurrency", "1,3", "--input-len", "6", "--output-len", "5", "--num-rounds", "2"]
    flags += ["--plot", str(tmp_path / "t"), "--save-result", str(saved)]
    assert main(["bench", "throughput", *flags]) == 0

    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(saved.read_text()) == report
    assert report["benchmark"] == "throughput"
    assert report["workload"]["model"] == "tiny"  # not where it lay for a while
    assert report["workload"]["dtype"] == "float32"
    assert report["workload"]["threads_per_rank"] == 1
    assert [result["concurrency"] for result in report["results"]] == [1, 3]
    assert "6 tokens in, 5 out" in read_figure(tmp_path / "t")
    for result in report["results"]:
        assert result["output_tokens"] == result["concurrency"] * 5
        assert result["total_tokens"] == result["concurrency"] * (6 + 5)
        assert len(result["seconds"]) == 2
        rate = result["output_tokens"] / statistics.median(result["seconds"])
        assert result["output_tokens_per_s"] == pytest.approx(rate, rel=0.01)
        assert result["total_tokens_per_s"] == pytest.approx(rate * 11 / 5, rel=0.01)
        assert result["slowest_by_fastest"] >= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--random-checkpoint", "peers"],
            "there is no random checkpoint 'peers'; wanted one of peers-536m, tiny",
        ),
        (["some/model", "--random-checkpoint", "tiny"], "give MODEL or --random-checkpoint, not both"),
        (["--output-len", "0"], "output_len must be at least 1, got 0"),
        (["--plot", "/nowhere/x"], "--plot /nowhere/x: give a prefix in a directory that exists"),
    ],
)
def test_bad_flags_are_refused_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "throughput", *flags]) == 2
    assert message in capsys.readouterr().err


def test_concurrency_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"concurrency must be whole numbers of at least 1, got \[8, 0\]"):
        ThroughputWorkload(concurrency=(8, 0))


def test_the_figure_has_a_line_of_each_rate(tmp_path: Path) -> None:
    workload = ThroughputWorkload(concurrency=(8, 1), input_len=6, output_len=5)
    results = [throughput._result(seconds, n, workload) for n, seconds in ((8, [0.5, 0.7]), (1, [0.2, 0.3]))]
    throughput.draw(results, {"input_len": 6, "output_len": 5}, str(tmp_path / "t"))
    drawn = read_figure(tmp_path / "t")
    assert {"6 tokens in, 5 out", "requests at once", "tokens/s", "output", "total", "1", "8"} <= drawn
