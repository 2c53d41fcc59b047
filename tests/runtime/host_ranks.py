"""Processes that play the ranks of one host, for tests of what joins them."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from moe_runtime.parallel import host_link
from moe_runtime.parallel.host_link import HostLink

Scenario = Callable[..., Any]

# Children start from a process that has imported torch once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "moe_runtime.parallel.shared_memory"])


def start(
    scenario: Scenario,
    size: int,
    folder: Path,
    *args: Any,
    timeout_s: float = 60,
    slice_s: float | None = None,
) -> list[BaseProcess]:
    """Start `size` processes that join a link and run `scenario(link, *args)`; see `result`."""
    processes = [
        _context.Process(
            target=_main, args=(scenario, rank, size, folder, timeout_s, slice_s, args), daemon=True
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def result(folder: Path, rank: int, within_s: float = 90) -> Any:
    """What the rank's scenario returned; its error is raised as a RuntimeError that holds the traceback."""
    path = folder / f"result-{rank}"
    deadline = time.monotonic() + within_s
    while not path.exists():
        assert time.monotonic() < deadline, f"rank {rank} gave no result within {within_s} s"
        time.sleep(0.01)
    outcome = json.loads(path.read_text())
    if "error" in outcome:
        raise RuntimeError(f"rank {rank}: {outcome['error']}")
    return outcome["value"]


def run(scenario: Scenario, size: int, folder: Path, *args: Any, **settings: Any) -> list[Any]:
    """What `scenario` returned on each rank; arguments as for `start`."""
    processes = start(scenario, size, folder, *args, **settings)
    try:
        return [result(folder, rank) for rank in range(size)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def check_survivors(scenario: Scenario, size: int, lost: int, folder: Path, *args: Any) -> None:
    """All ranks but `lost`, which dies, soon see that and name it: their scenarios return seconds and a message."""
    processes = start(scenario, size, folder, *args)
    try:
        for rank in set(range(size)) - {lost}:
            waited_s, message = result(folder, rank)
            assert f"rank {lost} (pid {processes[lost].pid})" in message
            assert waited_s < 1.5  # the link's own time-out is 60 s
    finally:
        for process in processes:
            process.kill()


def holders_of_link_memory() -> set[int]:
    """Ids of the processes of this machine that map some link's memory."""
    holders = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if "/memfd:moe_runtime" in maps.read_text():
                holders.add(int(maps.parent.name))
        except (OSError, ProcessLookupError):
            continue
    return holders


def agree_through(folder: Path, rank: int, size: int) -> Callable[[list[int]], list[list[int]]]:
    """An agreement by files: slow, and free of whatever is under test."""
    calls = 0

    def agree(values: list[int]) -> list[list[int]]:
        nonlocal calls
        calls += 1
        _publish(folder / f"agree-{calls}-{rank}", values)
        everyone = [folder / f"agree-{calls}-{r}" for r in range(size)]
        while not all(path.exists() for path in everyone):
            time.sleep(0.002)
        return [json.loads(path.read_text()) for path in everyone]

    return agree


def _main(
    scenario: Scenario,
    rank: int,
    size: int,
    folder: Path,
    timeout_s: float,
    slice_s: float | None,
    args: tuple[Any, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    if slice_s is not None:
        host_link._SLICE_S = slice_s
    try:
        link = HostLink.join(rank, size, agree_through(folder, rank, size), timeout_s)
        outcome = {"value": scenario(link, *args)}
    except BaseException:
        outcome = {"error": traceback.format_exc()}
    _publish(folder / f"result-{rank}", outcome)
    signal.pause()  # until `start`'s caller kills it: to ranks that still wait, one that ends has died


def _publish(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value))
    temporary.rename(path)
