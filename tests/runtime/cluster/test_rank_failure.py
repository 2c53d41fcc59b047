"""A rank that dies, raises or freezes while it serves ends the deployment within seconds, and is named."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray

from moe_runtime import LLM, SamplingParams, deployment
from moe_runtime.engine import Engine
from moe_runtime.errors import EngineDeadError, RankFailedError
from tests.runtime.cluster.program import SCENARIOS, running

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

LONG = SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True)
PROMPTS = ["one", "two", "three", "four"]
LIMIT_S = 10


def _fail_while_generating(model: LLM, fault: Callable[[], None]) -> str:
    """The error's text; asserts that it came in time, that every rank ended and that the LLM says so."""
    pids = [report.pid for report in model.ranks]
    started = model.stream(PROMPTS[0], LONG)
    next(started)
    fault()
    start = time.monotonic()
    with pytest.raises(RankFailedError) as raised:
        list(started)
    assert time.monotonic() - start < LIMIT_S
    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=LIMIT_S)
    assert not alive, "a rank outlived the failure"
    with pytest.raises(EngineDeadError, match="has ended"):
        model.generate("again", LONG, use_tqdm=False)
    return str(raised.value)


def test_a_killed_rank_is_named() -> None:
    with LLM(expert_parallel_size=3, device="cpu", use_tqdm=False) as model:
        pid = model.ranks[1].pid
        message = _fail_while_generating(model, lambda: os.kill(pid, signal.SIGKILL))
    assert message.startswith(
        f"rank 1 (node {ray.util.get_node_ip_address()}, pid {pid}) died; every request"
    )
    assert "\n" not in message


def test_an_exception_in_a_forward_pass_names_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = "tests.runtime.cluster.failing_worker:FailingWorker"
    monkeypatch.setattr(deployment, "Engine", functools.partial(Engine, worker=worker))
    with LLM(expert_parallel_size=2, device="cpu", use_tqdm=False) as model:
        pid = model.ranks[1].pid
        message = _fail_while_generating(model, lambda: None)
    assert f"rank 1 (node {ray.util.get_node_ip_address()}, pid {pid}) failed: ZeroDivisionError: " in message
    assert "failing_run" in message, "the rank's own traceback belongs to it"


@pytest.mark.slow
def test_a_frozen_rank_is_named_when_its_peers_give_up() -> None:
    with LLM(expert_parallel_size=2, device="cpu", process_group_timeout_s=4, use_tqdm=False) as model:
        pid = model.ranks[1].pid
        message = _fail_while_generating(model, lambda: os.kill(pid, signal.SIGSTOP))
    assert message.startswith(f"rank 1 (node {ray.util.get_node_ip_address()}, pid {pid}) stopped answering")
    assert "rank 0 (node" in message


def test_the_command_line_says_which_rank_died_and_exits_with_1(tmp_path: Path) -> None:
    command = [SCENARIOS / "command.py", "generate", "--prompt", "Hello", "--expert-parallel-size", "2"]
    command += ["--device", "cpu", "--max-tokens", "4000", "--ignore-eos"]
    address = ray.get_runtime_context().gcs_address
    with running(tmp_path, command, env={"RAY_ADDRESS": address}) as program:
        program.wait_for("@generate")
        pid = int(program.stdout.split("@ranks ")[1].split()[1])
        os.kill(pid, signal.SIGKILL)
        assert program.finish(LIMIT_S) == 1
        assert program.stderr.startswith("moe-runtime: RankFailedError: rank 1 (node ")
        assert program.stderr.count("\n") == 1
