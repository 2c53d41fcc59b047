"""`bench startup`: phases add up, every mode sees its phases and leaves nothing, bad input is refused at once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.bench.startup.child import PhaseWatch
from moe_runtime.bench.startup.phases import END, PHASES, split_phases
from moe_runtime.bench.startup.run import AIMS
from moe_runtime.cli.main import main
from moe_runtime.rank_spec import StartUpStep
from tests.runtime.cluster.program import running

TINY = ["--random-checkpoint", "tiny", "--dtype", "float32", "--threads-per-rank", "1", "--num-runs", "1"]
ATTACHING = {"imports", "checkpoint", "ray", "attach", "connect", "first token"}


def test_a_phase_lasts_until_the_next_one_begins() -> None:
    began = {"ray": 13.0, "checkpoint": 12.5, "first token": 20.0, "end": 21.0}

    phases = split_phases(began, spawned=10.0)
    assert phases == {"imports": 2.5, "checkpoint": 0.5, "ray": 7.0, "first token": 1.0}
    assert list(phases) == [name for name in PHASES if name in phases]


def test_a_phase_begins_with_the_first_of_its_calls() -> None:
    class Calls:
        def ask(self, method: str) -> str:
            return method * 2

    watch = PhaseWatch()
    watch.on_call(Calls, "ask", "join", only_with="b")
    assert Calls().ask("a") == "aa"
    assert watch.began == {}
    assert Calls().ask("b") == "bb"
    first = watch.began["join"]
    Calls().ask("b")
    assert watch.began == {"join": first}


def test_a_rank_that_is_ahead_of_the_others_begins_no_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = PhaseWatch()
    steps = [
        StartUpStep("load", 5),
        StartUpStep("compile", 0, 4),  # one rank has its caches, the other still loads
        StartUpStep("load", 5),
        StartUpStep("compile", 1, 4),
        StartUpStep("compile", 0, 4),
        StartUpStep("compile", 1, 4),
        StartUpStep("compile", 2, 4),
    ]
    for now, step in enumerate(steps):
        monkeypatch.setattr(time, "monotonic", lambda now=now: float(now))
        watch.count(step)
    assert split_phases({**watch.began, "load": -2.0, "connect": 9.0, "end": 9.5}, spawned=-3.0) == {
        "imports": 1.0,
        "load": 4.0,
        "caches": 2.0,
        "compile": 2.0,
        "dispatchers": 3.0,
        "connect": 0.5,
    }


def test_where_nothing_is_compiled_the_phase_is_there_and_empty() -> None:
    watch = PhaseWatch()
    watch.count(StartUpStep("load", 5))
    watch.count(StartUpStep("compile", 0, 0))
    phases = split_phases({**watch.began, END: watch.began["dispatchers"] + 1}, spawned=watch.began["caches"])
    assert (phases["compile"], phases["dispatchers"]) == (0.0, 1.0)


def _check(report: Any, starts: dict[str, set[str]]) -> None:
    assert [result["start"] for result in report["results"]] == list(starts)
    for result in report["results"]:
        assert set(result["phases_median_s"]) == starts[result["start"]]
        (total,), (phases,) = result["seconds"], result["phases_s"]
        assert total == pytest.approx(sum(phases.values()), abs=0.02)
        assert all(seconds >= 0 for seconds in phases.values())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_attaching_to_a_deployment_that_it_starts_and_ends(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from moe_runtime.named import deployment_names

    pytest.importorskip("matplotlib")
    assert main(["bench", "startup", "--mode", "attach", *TINY, "--plot", str(tmp_path / "s")]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])

    _check(report, {"warm": ATTACHING})
    assert (report["workload"]["aim_s"], report["workload"]["dtype"]) == (AIMS["attach"], "float32")
    assert deployment_names() == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.png", "s.svg"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["own-ray", "running-ray"])
def test_a_process_that_starts_its_ranks(mode: str, tmp_path: Path) -> None:
    command = ["-m", "moe_runtime", "bench", "startup", "--mode", mode, *TINY, "--expert-parallel-size", "2"]
    with running(tmp_path, command, {"RAY_ADDRESS": "local"}) as program:
        program.succeed(timeout_s=600)
        program.assert_left_nothing()
    phases = set(PHASES) - {"attach"}
    _check(json.loads(program.stdout.splitlines()[-1]), {"cold": phases, "warm": phases})


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_what_a_process_refuses_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "startup", "--mode", "running-ray", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode", "runing-ray"], "did you mean 'running-ray'?"),
        (["--num-runs", "0"], "--num-runs must be at least 1, got 0"),
        (["--max-num-seqs", "0"], "max_num_seqs must be a whole number of at least 1"),
        (["x", "--random-checkpoint", "tiny"], "give MODEL or --random-checkpoint, not both"),
        (["--plot", "/nowhere/x"], "--plot /nowhere/x: give a prefix in a directory that exists"),
    ],
)
def test_bad_flags_are_refused_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "startup", *flags]) == 2
    assert message in capsys.readouterr().err
