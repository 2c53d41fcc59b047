"""`serve run moe_runtime.server.ray_serve:build`: replicas that share one set of ranks, on a Ray that runs already."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from ray.util.state import list_actors

from tests.runtime.cluster.head import ENVIRONMENT, Head, free_ports, started_head
from tests.runtime.cluster.program import running
from tests.source_tree import ROOT, package_folders

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TIMEOUT_S = 180
SERVE = Path(sys.executable).with_name("serve")
BUILD = "moe_runtime.server.ray_serve:build"
ARGUMENTS = ("device=cpu", "dtype=float32", "expert_parallel_size=2", "num_replicas=2")
GREEDY = {"prompt": "The experts of", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    with started_head(tmp_path) as head:
        yield head


def _serve(head: Head, *arguments: str) -> None:
    """Run one of Serve's own commands to its end."""
    folders = os.pathsep.join(map(str, package_folders()))
    done = subprocess.run(
        [SERVE, *arguments],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": folders, "RAY_ADDRESS": head.address},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _wait(what: str, holds: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.2)


def _actors(head: Head, name: str) -> list[Any]:
    return [a for a in list_actors(head.dashboard, filters=[("state", "=", "ALIVE")]) if name in a.class_name]


def _rank_pids(head: Head) -> set[int]:
    return {actor.pid for actor in _actors(head, "RankActor")}


def _tokens(url: str) -> list[int]:
    body = {**GREEDY, "return_token_ids": True}
    answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def _num_running(url: str) -> int:
    ranks = httpx2.get(f"{url}/v1/ranks", timeout=60).json()["data"]
    return sum(rank["load"]["scheduler"]["num_running"] for rank in ranks)


def _direct_tokens(head: Head, directory: Path) -> list[int]:
    """What uvicorn in a driver answers from the same ranks."""
    (port,) = free_ports(1)
    argv = ["-m", "moe_runtime", "serve", "--connect", "serve", "--host", "127.0.0.1", "--port", port]
    directory.mkdir()
    with running(directory, list(map(str, argv)), {**ENVIRONMENT, "RAY_ADDRESS": head.address}) as server:
        server.wait_for("serving serve at ")
        return _tokens(f"http://127.0.0.1:{port}")


def _leave_a_stream(url: str) -> None:
    body = {**GREEDY, "max_tokens": 6000, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()  # closes the connection when it is dropped
        assert next(lines).startswith("data: ")
        _wait("it to be at work after its first piece", lambda: _num_running(url) == 1, timeout_s=10)


def test_replicas_share_the_ranks_updates_keep_them_and_shutdown_frees_all(
    head: Head, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    _serve(head, "start", "--http-port", str(port))
    _serve(head, "run", "--non-blocking", "--name=moe", BUILD, *ARGUMENTS)
    assert httpx2.get(f"{url}/health", timeout=60).status_code == 200
    assert len(_actors(head, "moe:Http")) == 2
    ranks = _rank_pids(head)
    assert len(ranks) == 2

    assert {tuple(_tokens(url)) for _ in range(8)} == {tuple(_direct_tokens(head, tmp_path / "direct"))}
    _leave_a_stream(url)
    _wait("the ranks to stop what nobody waits for", lambda: _num_running(url) == 0)

    _serve(head, "run", "--non-blocking", "--name=moe", BUILD, *ARGUMENTS, "max_n=2")
    refused = httpx2.post(f"{url}/v1/completions", json={**GREEDY, "n": 3}, timeout=60)
    assert refused.status_code == 400, "the update has not arrived"
    assert _rank_pids(head) == ranks, "an update of the server has reloaded the model"
    assert len(_tokens(url)) == 12

    _serve(head, "shutdown", "--yes", "--address", head.dashboard)
    _wait("the end of all actors and placement groups", lambda: not head.left())
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health")
