"""`bench throughput`: token counts add up, a peer gets the same prompts, bad input is refused at once."""

from __future__ import annotations

import json
import statistics

import pytest

from moe_runtime.bench.throughput import ThroughputWorkload
from moe_runtime.cli.main import main
from moe_runtime.errors import ConfigError


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_tiny_checkpoint_beside_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--random-checkpoint", "tiny", "--dtype", "float32", "--threads-per-rank", "1"]
    flags += ["--concurrency", "1,3", "--input-len", "6", "--output-len", "5", "--num-rounds", "2"]
    assert main(["bench", "throughput", *flags, "--compare", "transformers"]) == 0

    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["benchmark"] == "throughput"
    assert report["workload"]["dtype"] == "float32"
    assert report["workload"]["threads_per_rank"] == 1
    assert [result["concurrency"] for result in report["results"]] == [1, 3]
    for result in report["results"]:
        assert result["output_tokens"] == result["concurrency"] * 5
        assert result["total_tokens"] == result["concurrency"] * (6 + 5)
        for system in (result, result["transformers"]):
            assert len(system["seconds"]) == 2
            rate = result["output_tokens"] / statistics.median(system["seconds"])
            assert system["output_tokens_per_s"] == pytest.approx(rate, rel=0.01)
            assert system["total_tokens_per_s"] == pytest.approx(rate * 11 / 5, rel=0.01)
            assert system["slowest_by_fastest"] >= 1
        assert result["ratio"] > 0
        assert result["equal_outputs"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--random-checkpoint", "peers"],
            "there is no random checkpoint 'peers'; wanted one of peers-536m, tiny",
        ),
        (["some/model", "--random-checkpoint", "tiny"], "give MODEL or --random-checkpoint, not both"),
        (["--compare", "transformer"], "compare must be one of transformers, got 'transformer'"),
        (["--output-len", "0"], "output_len must be at least 1, got 0"),
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
