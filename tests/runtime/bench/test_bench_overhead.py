"""`bench overhead`: cases, the table, and a JSON object that anyone can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_runtime.bench.overhead import RANK_PARTS, OverheadWorkload, draw
from moe_runtime.cli.main import main
from moe_runtime.errors import ConfigError
from tests.runtime.bench.figures import read_figure


def test_two_sizes_give_numbers_for_every_part(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, plot = tmp_path / "result.json", tmp_path / "figure" / "o"
    plot.parent.mkdir()
    flags = ["--num-seqs", "1,3", "--vocab-size", "512", "--steps", "5"]
    assert main(["bench", "overhead", *flags, "--save-result", str(file), "--plot", str(plot)]) == 0

    lines = capfd.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert json.loads(file.read_text()) == report
    assert report["benchmark"] == "overhead"
    assert report["hardware"]["cores"] >= 1
    assert report["hardware"]["device"]
    assert report["workload"]["num_steps"] == 5
    assert report["workload"]["agreement_2_ranks_gloo_us"] > 0
    assert any("3 greedy of 512" in line for line in lines)
    assert {"greedy of 512", *RANK_PARTS} <= read_figure(plot)
    assert [(r["num_seqs"], r["vocab_size"], r["sampling"]) for r in report["results"]] == [
        (1, 512, "greedy"),
        (3, 512, "greedy"),
    ]
    for result in report["results"]:
        assert set(result["parts_us"]) == set(result["parts_cpu_us"]) == set(RANK_PARTS)
        assert all(result["parts_us"][part] > 0 for part in RANK_PARTS)
        assert result["step_us"] >= max(result["parts_us"].values())
        assert result["step_cpu_us"] > 0
        assert {"MainThread", "channel-writer"} <= set(result["cpu_share"])
        assert result["tokens"] >= 3 * result["num_seqs"]
        expected = 1e6 * result["num_seqs"] / result["step_us_outside"]
        assert result["tokens_per_s"] == pytest.approx(expected, rel=0.01)
        assert all(microseconds > 0 for microseconds in result["driver_us"].values())


def test_the_figure_has_a_panel_for_each_way_of_sampling(tmp_path: Path) -> None:
    results = [
        {"num_seqs": n, "vocab_size": size, "sampling": how, "parts_us": dict.fromkeys(RANK_PARTS, 10.0 * n)}
        for size, how in ((1024, "greedy"), (151_936, "greedy"), (151_936, "top-p"))
        for n in (1, 32)
    ]
    draw(results, str(tmp_path / "o"))
    drawn = read_figure(tmp_path / "o")
    assert {*RANK_PARTS, "1", "32", "µs a step"} <= drawn
    assert {"greedy of 1,024", "greedy of 151,936", "top-p of 151,936"} <= drawn


def test_a_large_vocabulary_is_measured_greedily_and_drawn_from_in_fewer_steps() -> None:
    cases = OverheadWorkload(num_seqs=(4,), vocab_sizes=(1024, 151_936), num_steps=100).cases()
    assert [(c.vocab_size, c.sampling, c.num_steps) for c in cases] == [
        (1024, "greedy", 100),
        (151_936, "greedy", 5),
        (151_936, "top-p", 5),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_seqs": (0,)}, r"num_seqs must be whole numbers of at least 1, got \[0\]"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"vocab_sizes": (8,)}, "vocab_sizes must be at least 64, got 8"),
    ],
)
def test_what_cannot_be_measured_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OverheadWorkload(**fields)  # type: ignore[arg-type]


def test_bad_flags_are_refused_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "overhead", "--num-seqs", "1,many"])
    assert exit_info.value.code == 2
    assert "'1,many' is no list of whole numbers such as 1,8,32" in capsys.readouterr().err
    missing = tmp_path / "missing" / "result.json"
    assert main(["bench", "overhead", "--save-result", str(missing)]) == 2
    assert f"--save-result {missing}: give a file in a directory that exists" in capsys.readouterr().err
