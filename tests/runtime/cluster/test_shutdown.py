"""However a deployment ends, it leaves no process, no placement group and no shared memory behind."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray
from ray.util import placement_group_table

from tests.runtime.cluster.head import started_head
from tests.runtime.cluster.program import SCENARIOS, running

pytestmark = pytest.mark.ray

OWN_RAY = {"RAY_ADDRESS": "local"}
SOME_MOMENTS = ("load",)
OTHER_MOMENTS = ("connect", "inspect", "reserve", "create", "join", "generate")
# The two agents of a node whose raylet was killed outright give up on it after about a minute.
RAY_AGENTS_END_WITHIN_S = 100


def _generate() -> list[str | Path]:
    command: list[str | Path] = [SCENARIOS / "command.py", "generate", "--prompt", "Hello", "--device", "cpu"]
    return [*command, "--expert-parallel-size", "2", "--ignore-eos", "--max-tokens", "4000"]


@pytest.mark.slow
def test_the_end_of_a_with_block_leaves_nothing_to_its_process(tmp_path: Path) -> None:
    with running(tmp_path, [SCENARIOS / "with_block.py"], OWN_RAY) as program:
        program.succeed()
        program.assert_left_nothing()


def test_an_async_llm_that_is_never_shut_down_leaves_nothing(tmp_path: Path) -> None:
    with running(tmp_path, [SCENARIOS / "never_shut_down.py", "8"], OWN_RAY) as program:
        program.succeed()
        assert program.stderr == ""
        program.assert_left_nothing()


@pytest.mark.slow
def test_ctrl_c_ends_an_async_llm_and_leaves_nothing(tmp_path: Path) -> None:
    with running(tmp_path, [SCENARIOS / "never_shut_down.py", "8000"], OWN_RAY) as program:
        program.wait_for("@answered")  # in the midst of the long one
        program.interrupt()
        assert program.finish(timeout_s=20) != 0
        assert program.stderr.endswith("KeyboardInterrupt\n")
        program.assert_left_nothing()


@pytest.mark.parametrize(
    "moment", [*SOME_MOMENTS, *(pytest.param(m, marks=pytest.mark.slow) for m in OTHER_MOMENTS)]
)
def test_ctrl_c_ends_with_one_line_and_leaves_nothing(tmp_path: Path, moment: str) -> None:
    with running(tmp_path, _generate(), OWN_RAY) as program:
        program.wait_for(f"@{moment}")
        program.interrupt()
        assert program.finish() == 130
        assert program.stderr == "moe-runtime: interrupted\n"
        program.assert_left_nothing()


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.5, 1.5, 2.5, 3.5, 5])
def test_ctrl_c_while_ray_starts_leaves_nothing(tmp_path: Path, delay_s: float) -> None:
    with running(tmp_path, _generate(), OWN_RAY) as program:
        program.wait_for("@connect")
        time.sleep(delay_s)  # Ray starts its processes one after the other
        program.interrupt()
        assert program.finish() == 130
        assert program.stderr == "moe-runtime: interrupted\n"
        program.assert_left_nothing()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["load", "generate"])
def test_sigterm_ends_with_its_status_and_leaves_nothing(tmp_path: Path, moment: str) -> None:
    with running(tmp_path, _generate(), OWN_RAY) as program:
        program.wait_for(f"@{moment}")
        program.signal(signal.SIGTERM)
        assert program.finish() == 128 + signal.SIGTERM
        assert program.stderr == ""
        program.assert_left_nothing()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["connect", "load", "generate"])
def test_a_killed_driver_leaves_nothing_of_its_own_ray(tmp_path: Path, moment: str) -> None:
    with running(tmp_path, _generate(), OWN_RAY) as program:
        program.wait_for(f"@{moment}")
        program.signal(signal.SIGKILL)
        program.finish()
        program.assert_left_nothing(RAY_AGENTS_END_WITHIN_S)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_batch_that_is_stopped_keeps_its_answers_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [
        {"model": "demo", "prompt": "Hello", "ignore_eos": True, "max_tokens": length}
        for length in (1, 8000, 8000)
    ]
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": body}
        for n, body in enumerate(bodies)
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    files = ["-i", source, "-o", target, "--device", "cpu"]
    with running(tmp_path, [SCENARIOS / "command.py", "run-batch", *files], OWN_RAY) as program:
        program.wait_until("the first answer", lambda: target.exists() and target.read_text() != "")
        program.signal(number)
        assert program.finish() == status
        summary = f"moe-runtime: 1 of 3 requests answered, 2 left: {target}\n"
        assert program.stderr == summary + ("moe-runtime: interrupted\n" if number == signal.SIGINT else "")
        program.assert_left_nothing()
    (answer,) = map(json.loads, target.read_text().splitlines())
    assert answer["custom_id"] == "0"


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("generate", signal.SIGKILL),
        ("load", signal.SIGINT),
        pytest.param("create", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("generate", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("load", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_driver_that_ends_leaves_nothing_in_the_cluster_that_it_joined(
    tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    status = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    address = ray.get_runtime_context().gcs_address
    with running(tmp_path, _generate(), {"RAY_ADDRESS": address}) as program:
        program.wait_for(f"@{moment}")
        assert _placed_groups()
        program.signal(number)
        assert program.finish() == status
        assert program.stderr == ("moe-runtime: interrupted\n" if number == signal.SIGINT else "")
        program.assert_left_nothing()
    deadline = time.monotonic() + 15
    while (left := _placed_groups() + _rank_actors()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@pytest.mark.slow
def test_a_head_that_asks_for_the_token_at_hand_is_joined_without_further_ado(tmp_path: Path) -> None:
    """As on a machine where Ray ran before: then a token is there, and `ray start` asks for it."""
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0123456789abcdef" * 4)
    defaults = {"HOME": str(tmp_path), "RAY_AUTH_MODE": None}
    status = [SCENARIOS / "command.py", "status"]
    with started_head(tmp_path, defaults) as head:
        joined = tmp_path / "joined"
        joined.mkdir()
        env = {**defaults, "RAY_ADDRESS": None, "RAY_TMPDIR": head.temp_directory}
        with running(joined, status, env) as program:
            program.succeed()
            assert "no deployment is running" in program.stdout
        refused = tmp_path / "refused"
        refused.mkdir()
        with running(refused, status, {**env, "RAY_AUTH_MODE": "disabled"}) as program:
            assert program.finish() == 2
            assert "RAY_AUTH_MODE must be the same here" in program.stderr.splitlines()[-1]


def _placed_groups() -> list[str]:
    return [key for key, group in placement_group_table().items() if group["state"] != "REMOVED"]


def _rank_actors() -> list[str]:
    """Rank processes of the session's Ray, which is a child of this process."""
    titles = []
    for process in psutil.Process().children(recursive=True):
        try:
            titles.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return [title for title in titles if "RankActor" in title]
