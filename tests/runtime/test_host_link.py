"""Ranks of one host: they agree, they sleep while they wait, and none waits for one that is gone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_runtime.errors import ConfigError, PeerLostError
from moe_runtime.parallel.host_link import HostLink
from moe_runtime.parallel.peers import Peer
from tests.runtime.host_ranks import holders_of_link_memory, result, run, start
from tests.source_tree import ROOT

LOST = 1  # the rank that goes away


def _agree_often(link: HostLink, times: int) -> int:
    jitter = random.Random(link.rank)
    values = [random.Random(f"{rank}") for rank in range(link.size)]
    for step in range(times):
        expected = [[v.randrange(-(1 << 62), 1 << 62), step] for v in values]
        if jitter.random() < 0.01:
            time.sleep(0.002)
        assert link.agree(expected[link.rank]) == expected
    return times


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_see_the_values_of_all_in_thousands_of_agreements(size: int, tmp_path: Path) -> None:
    assert run(_agree_often, size, tmp_path, 3000) == [3000] * size


def _lose_a_peer(link: HostLink, how: str) -> list[object]:
    """How long the wait for the lost rank took, and the error that ended it."""
    for step in range(20):
        link.agree([step])
    if link.rank == LOST:
        time.sleep(0.5)  # the others sleep in their wait by now
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "left":
            link.close()
        time.sleep(3)
        return []
    start_s = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        link.agree([20])
    return [time.monotonic() - start_s, str(caught.value)]


@pytest.mark.parametrize(
    ("how", "timeout_s", "words"),
    [
        ("killed", 60, "which shares memory with rank {me}, has died"),
        ("left", 60, "has left"),
        ("silent", 1.0, "rank {me} waited 1 s for rank 1"),
    ],
)
def test_survivors_stop_waiting_and_name_the_peer(
    how: str, timeout_s: float, words: str, tmp_path: Path
) -> None:
    processes = start(_lose_a_peer, 3, tmp_path, how, timeout_s=timeout_s)
    try:
        for rank in (0, 2):
            waited_s, message = result(tmp_path, rank)
            assert words.format(me=rank) in message
            assert f"rank {LOST} (pid {processes[LOST].pid})" in message
            assert waited_s < 0.5 + 1.5  # until it went, and until that was seen: far below 60 s
    finally:
        for process in processes:
            process.kill()


def _leave_early(link: HostLink) -> list[int]:
    link.agree([link.rank])
    if link.rank == LOST:
        link.close()
    return [link.rank]


def test_a_rank_that_leaves_after_its_part_disturbs_no_wait_that_it_took_part_in(tmp_path: Path) -> None:
    assert run(_leave_early, 3, tmp_path) == [[0], [1], [2]]


def _sleep_while_waiting(link: HostLink) -> float:
    link.agree([0])
    if link.rank == LOST:
        time.sleep(2)
    before = time.process_time()
    link.agree([1])
    return time.process_time() - before


def test_waiting_takes_no_cpu(tmp_path: Path) -> None:
    assert run(_sleep_while_waiting, 2, tmp_path)[0] < 0.2  # of the two seconds


def _interrupted(link: HostLink) -> str:
    class _InterruptError(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise _InterruptError

    link.agree([0])
    if link.rank == LOST:
        time.sleep(3)
        return "slept"
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    start_s = time.monotonic()
    with pytest.raises(_InterruptError):
        link.agree([1])
    return "at once" if time.monotonic() - start_s < 2 else "late"


def test_a_signal_ends_a_wait(tmp_path: Path) -> None:
    assert run(_interrupted, 2, tmp_path) == ["at once", "slept"]


def _ask_for_too_much(link: HostLink) -> str:
    with pytest.raises(ConfigError) as caught:
        link.map(1 << 60)
    return str(caught.value)


def test_more_memory_than_there_is_is_refused_with_the_numbers(tmp_path: Path) -> None:
    for message in run(_ask_for_too_much, 2, tmp_path):
        assert "the ranks' shared buffers need 1152921504607 MB, this machine has" in message


def test_a_process_that_ended_is_not_alive_even_before_its_parent_has_waited_for_it() -> None:
    child = subprocess.Popen(["sleep", "60"])
    stat = Path(f"/proc/{child.pid}/stat").read_text()
    peer = Peer(child.pid, int(stat.rpartition(")")[2].split()[19]))
    assert peer.is_alive()
    assert not Peer(child.pid, peer.start_ticks + 1).is_alive()  # the id, in use by another process
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not peer.is_alive()
    child.wait()
    assert not peer.is_alive()


DRIVER = """
import sys, time
from pathlib import Path
from tests.runtime.host_ranks import start
from tests.runtime.test_host_link import _map_and_wait
if __name__ == "__main__":
    start(_map_and_wait, 2, Path(sys.argv[1]))
    time.sleep(60)
"""


def _map_and_wait(link: HostLink) -> None:
    link.map(1 << 20)
    link.agree([0])
    _note_pid(link)
    time.sleep(60)


def _note_pid(link: HostLink) -> None:
    folder = Path(os.environ["HOST_LINK_TEST_FOLDER"])
    (folder / f"pid-{link.rank}.tmp").write_text(str(os.getpid()))
    (folder / f"pid-{link.rank}.tmp").rename(folder / f"pid-{link.rank}")


@pytest.mark.parametrize("order", [("driver", 0, 1), (0, 1, "driver"), (1, "driver", 0)])
def test_nothing_is_left_behind_whichever_process_dies_first(
    order: tuple[str | int, ...], tmp_path: Path
) -> None:
    names_before = set(os.listdir("/dev/shm"))
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        env={
            **os.environ,
            "HOST_LINK_TEST_FOLDER": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "models"))),
        },
    )
    pids: dict[str | int, int] = {"driver": driver.pid}
    try:
        deadline = time.monotonic() + 60
        for rank in (0, 1):
            while not (tmp_path / f"pid-{rank}").exists():
                assert time.monotonic() < deadline, "the ranks did not start"
                time.sleep(0.02)
            pids[rank] = int((tmp_path / f"pid-{rank}").read_text())
        assert {pids[0], pids[1]} <= holders_of_link_memory()
    finally:
        for who in order:
            if who in pids:
                _kill(pids[who])
        driver.wait()
    deadline = time.monotonic() + 10
    while {pids[0], pids[1]} & holders_of_link_memory():
        assert time.monotonic() < deadline, "the memory outlived its processes"
        time.sleep(0.05)
    assert not [n for n in set(os.listdir("/dev/shm")) - names_before if "moe" in n]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
