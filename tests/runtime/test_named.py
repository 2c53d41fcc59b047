"""Named deployments: several drivers, one set of ranks, which outlives each of them."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import ray
from ray.util import placement_group_table

from moe_runtime import LLM, SamplingParams, engine, named
from moe_runtime.cli.main import main
from moe_runtime.errors import ConfigError, EngineDeadError, MoeRuntimeError
from moe_runtime.named import NamedDeployment, deployment_names
from moe_runtime.status import deployment_status

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

NAME = "shared"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

_OTHER_DRIVER = """
import sys
from moe_runtime import LLM, SamplingParams
llm = LLM.connect("shared")
params = SamplingParams(temperature=0, max_tokens=int(sys.argv[1]), ignore_eos=True)
if len(sys.argv) > 2:  # begin, and vanish without a word
    for piece in llm.stream("The experts", params):
        import os
        print("streaming", flush=True)
        os.kill(os.getpid(), 9)
print(llm.generate("The experts", params, use_tqdm=False)[0].outputs[0].token_ids)
llm.shutdown()
"""


def _other_driver(*arguments: str) -> subprocess.CompletedProcess[str]:
    address = ray.get_runtime_context().gcs_address
    return subprocess.run(
        [sys.executable, "-c", _OTHER_DRIVER, *arguments],
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _tokens(llm: LLM) -> list[int]:
    return llm.generate("The experts", GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def _groups_created() -> int:
    return sum(group["state"] == "CREATED" for group in placement_group_table().values())


def _until(what: str, holds: object) -> None:
    deadline = time.monotonic() + 15
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def owner(ray_session: None) -> Iterator[LLM]:
    llm = LLM(name=NAME, expert_parallel_size=2, dtype="float32", use_tqdm=False)
    yield llm
    llm.shutdown()
    if NAME in deployment_names():
        assert main(["stop", NAME]) == 0


def test_drivers_in_this_process_and_in_another_get_their_own_answers(owner: LLM) -> None:
    expected = _tokens(owner)
    attached = LLM.connect(NAME)
    assert attached.info == owner.info
    assert _tokens(attached) == expected
    attached.shutdown()
    done = _other_driver("12")
    assert (done.returncode, done.stdout.strip()) == (0, str(expected)), done.stderr
    # Both have left, and the deployment goes on.
    assert _tokens(owner) == expected
    with pytest.raises(EngineDeadError, match="was shut down"):
        _tokens(attached)


def test_a_driver_that_vanishes_leaves_nothing_running(owner: LLM) -> None:
    expected = _tokens(owner)
    done = _other_driver("8000", "vanish")
    assert (done.returncode, done.stdout.strip()) == (-9, "streaming"), done.stderr
    _until(
        "the vanished driver's request still runs",
        lambda: not any(s.scheduler["num_running"] for s in owner.stats),
    )
    assert _tokens(owner) == expected


def _status(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["status", *arguments])
    return status, capsys.readouterr().out


def test_status_lists_what_runs_and_the_ranks_of_one(owner: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    ip = ray.util.get_node_ip_address()
    with LLM(expert_parallel_size=1, dtype="float32", use_tqdm=False):
        listed, text = _status(capsys, "--json")
    rows = [(d["name"], d["num_ranks"], d["nodes"], d["state"]) for d in json.loads(text)["deployments"]]
    assert (listed, rows) == (0, [(NAME, 2, [ip], "running"), (None, 1, [ip], "placed")])
    _tokens(owner)
    code, text = _status(capsys, NAME, "--json")
    shown = json.loads(text)
    assert (code, shown["state"], shown["serves"]) == (0, "running", True)
    for rank, report in zip(shown["ranks"], owner.ranks, strict=True):
        assert (rank["rank"], rank["pid"], rank["cache_tokens"]) == (
            report.rank,
            report.pid,
            report.cache_tokens,
        )
        assert rank["stats"]["loop"]["steps"] >= GREEDY.max_tokens
        assert rank["stats"]["scheduler"]["num_running"] == 0


def test_status_in_words_names_ranks_and_kernels(owner: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    code, table = _status(capsys)
    assert code == 0
    assert all(words in table for words in (NAME, owner.files.name, "running"))
    code, words = _status(capsys, NAME, "--verbose")
    assert code == 0
    for report in owner.ranks:
        assert f"rank {report.rank} (node {report.node_ip}, pid {report.pid})" in words
        assert all(line in words for line in report.kernel_plan)
    assert "kernel" not in _status(capsys, NAME)[1]


def test_a_taken_name_and_an_unknown_one_are_refused(owner: LLM) -> None:
    with pytest.raises(ConfigError, match=r"'shared' is running already; attach with LLM\.connect"):
        LLM(name=NAME, use_tqdm=False)
    with pytest.raises(ConfigError, match="no deployment named 'shard'; running: shared"):
        LLM.connect("shard")
    assert main(["stop", "shard"]) == 2
    assert main(["status", "shard"]) == 2


def test_a_start_that_fails_leaves_neither_name_nor_resources(owner: LLM) -> None:
    groups = _groups_created()
    with pytest.raises(MoeRuntimeError, match="does not hold one sequence"):
        LLM(name="too-small", kv_cache_memory_bytes=1000, use_tqdm=False)
    _until("the failed deployment's name is taken", lambda: deployment_names() == [NAME])
    _until("its placement group is still there", lambda: _groups_created() == groups)


def test_stop_ends_it_for_every_driver_and_frees_its_resources(owner: LLM) -> None:
    attached = LLM.connect(NAME)
    pids = [report.pid for report in owner.ranks]
    groups = _groups_created()
    stream = attached.stream("The experts", SamplingParams(temperature=0, max_tokens=8000, ignore_eos=True))
    next(stream)
    assert main(["stop", NAME]) == 0
    with pytest.raises(EngineDeadError):
        list(stream)
    with pytest.raises(EngineDeadError):
        _tokens(owner)
    _until("the name is still taken", lambda: deployment_names() == [])
    _until("the placement group is still there", lambda: _groups_created() == groups - 1)
    _until("a rank still runs", lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
    attached.shutdown()


def test_status_of_a_deployment_whose_rank_died_says_so_and_fails(
    ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with LLM(name="doomed", dtype="float32", use_tqdm=False) as llm:
        (report,) = llm.ranks
        os.kill(report.pid, signal.SIGKILL)
        _until("its end is not noticed", lambda: deployment_status("doomed").summary.state == "ended")
    try:
        assert main(["status", "doomed"]) == 1
        assert f"pid {report.pid}) died" in capsys.readouterr().err
    finally:
        assert main(["stop", "doomed"]) == 0


def test_status_of_a_cluster_where_nothing_runs(
    ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deployment_names() == []
    assert _status(capsys) == (0, "no deployment is running\n")
    assert _status(capsys, "--json") == (0, '{"deployments": []}\n')


class SilentOwner:
    """Says what it holds, and no more."""

    async def describe(self) -> tuple[str, str]:
        return "plan", "connection"

    async def ask(self, method: str, *args: object) -> None:
        await asyncio.sleep(600)


def test_an_owner_that_does_not_answer_is_an_error_and_no_hang(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "_ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(named, "_RPC_TIMEOUT_S", 0.6)
    owner = ray.remote(num_cpus=0)(SilentOwner).remote()
    try:
        deployment = NamedDeployment("quiet", owner)
        for ask, limit in [
            (deployment.check_health, "0.5"),
            (deployment.stats, "0.5"),
            (deployment.expert_load, "0.5"),
            (lambda: deployment.collective_rpc("where"), "0.6"),
        ]:
            with pytest.raises(
                EngineDeadError, match=f"owner of the deployment 'quiet' did not answer within {limit} s"
            ):
                ask()
    finally:
        ray.kill(owner)


def test_an_owner_has_longer_than_its_ranks() -> None:
    ranks_have = inspect.signature(engine.Engine.check_health).parameters["timeout_s"].default
    assert max(ranks_have, engine._STATS_TIMEOUT_S) < named._ANSWER_TIMEOUT_S
    assert engine._RPC_TIMEOUT_S < named._RPC_TIMEOUT_S


def test_without_a_cluster_there_is_one_line_and_no_ray_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert main(["status"]) == 2
    assert (
        "there is no Ray cluster here that does; start one with `ray start --head`" in capsys.readouterr().err
    )
