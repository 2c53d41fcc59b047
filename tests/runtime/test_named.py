"""Named deployments: several drivers, one set of ranks, which outlives each of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import ray
from ray.util import placement_group_table

from moe_runtime import LLM, SamplingParams
from moe_runtime.cli.main import main
from moe_runtime.errors import ConfigError, EngineDeadError, MoeRuntimeError
from moe_runtime.named import deployment_names

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


def test_a_taken_name_and_an_unknown_one_are_refused(owner: LLM) -> None:
    with pytest.raises(ConfigError, match=r"'shared' is running already; attach with LLM\.connect"):
        LLM(name=NAME, use_tqdm=False)
    with pytest.raises(ConfigError, match="no deployment named 'shard'; running: shared"):
        LLM.connect("shard")
    assert main(["stop", "shard"]) == 2


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
