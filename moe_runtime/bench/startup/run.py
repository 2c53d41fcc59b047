"""Starting processes one after the other, and the report of their phases."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from moe_runtime.bench.report import Report, TextTable, load_average
from moe_runtime.bench.startup.phases import PHASES, split_phases
from moe_runtime.errors import ConfigError, MoeRuntimeError, did_you_mean

# What a start should take at most, in seconds.
AIMS: Mapping[str, float] = {"own-ray": 15.0, "running-ray": 10.0, "attach": 1.0}
_CHILD = "moe_runtime.bench.startup.child"
_END_TIMEOUT_S = 60.0  # for a process that was interrupted to end what it has started


@dataclass(frozen=True, slots=True, kw_only=True)
class StartupWorkload:
    """What `bench startup` does."""

    mode: str = (
        "own-ray"  # own-ray: each process starts a Ray; running-ray: it finds one; attach: a deployment too
    )
    num_runs: int = 3  # cold ones, and as many warm ones

    def __post_init__(self) -> None:
        if self.mode not in AIMS:
            raise ConfigError(
                f"--mode must be one of {', '.join(AIMS)}, got {self.mode!r}{did_you_mean(self.mode, AIMS)}"
            )
        if self.num_runs < 1:
            raise ConfigError(f"--num-runs must be at least 1, got {self.num_runs}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StartupRun:
    """One process, from its start to its first token."""

    phases_s: Mapping[str, float]  # they add up to the whole
    cpu_s: (
        float  # CPU time of the process itself: less than the whole where it waited, or others had the cores
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Surroundings:
    """What a process finds when it starts."""

    env: Mapping[str, str]
    connect: str | None = None  # name of a deployment


def run_startup(model: str | None, workload: StartupWorkload, llm_args: Mapping[str, Any]) -> Report:
    """Start processes that each make an LLM and generate one token.

    Args:
        model: as in LLM.
        llm_args: further arguments of LLM.

    Raises:
        UserError: whatever LLM refuses.
        MoeRuntimeError: a process failed otherwise.
    """
    started_load = load_average()
    request = {"llm": {"model": model, **llm_args}}
    with _surroundings(request["llm"], workload.mode) as around:
        runs, facts = _run_all(request, around, workload)
    results = [_result(start, of_start) for start, of_start in runs.items()]
    return Report(
        benchmark="startup",
        device=facts.pop("device"),
        started_load=started_load,
        workload={
            **facts,
            "mode": workload.mode,
            "num_runs": workload.num_runs,
            "aim_s": AIMS[workload.mode],
        },
        results=results,
        tables=[_table(results, workload)],
    )


def _run_all(
    request: dict[str, Any], around: _Surroundings, workload: StartupWorkload
) -> tuple[dict[str, list[StartupRun]], dict[str, Any]]:
    """Every run, by kind of start, and facts about the deployment."""
    runs: dict[str, list[StartupRun]] = {}
    with tempfile.TemporaryDirectory(prefix="moe-runtime-") as directory:

        def start(kind: str, cache: str) -> dict[str, Any]:
            env = {**around.env, "MOE_RUNTIME_CACHE": f"{directory}/{cache}"}
            reply, spawned = _start(request if around.connect is None else {"connect": around.connect}, env)
            phases = split_phases(reply.pop("began"), spawned)
            runs.setdefault(kind, []).append(StartupRun(phases_s=phases, cpu_s=reply.pop("cpu_s")))
            return reply

        if around.connect is None:
            for number in range(workload.num_runs):
                start("cold", str(number))
        # A driver that attaches inspects nothing: there is nothing to be cold. Else the caches of the first cold run.
        for _ in range(workload.num_runs):
            facts = start("warm", "0")
    return runs, facts


@contextlib.contextmanager
def _surroundings(llm_args: Mapping[str, Any], mode: str) -> Iterator[_Surroundings]:
    """Ray and deployment as the mode wants them; what was started here is ended at the end of the block."""
    if mode == "own-ray":
        yield _Surroundings(env={"RAY_ADDRESS": "local"})
        return
    import ray

    from moe_runtime.connecting import ensure_ray

    connected = ensure_ray()
    try:
        env = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        if mode == "running-ray":
            yield _Surroundings(env=env)
        else:
            with _deployment(llm_args) as name:
                yield _Surroundings(env=env, connect=name)
    finally:
        if connected:
            ray.shutdown()


@contextlib.contextmanager
def _deployment(llm_args: Mapping[str, Any]) -> Iterator[str]:
    """A named one; yields its name."""
    from moe_runtime.llm import LLM
    from moe_runtime.named import stop_deployment

    name = f"bench-startup-{secrets.token_hex(4)}"
    with LLM(**llm_args, name=name, use_tqdm=False):
        pass  # it goes on without us
    try:
        yield name
    finally:
        stop_deployment(name)


def _start(request: Mapping[str, Any], env: Mapping[str, str]) -> tuple[dict[str, Any], float]:
    """Run one process to its end; returns what it says, and the clock when it was started.

    Raises:
        ConfigError, MoeRuntimeError: what it failed with.
    """
    command = [sys.executable, "-m", _CHILD, json.dumps(request)]
    spawned = time.monotonic()
    process = subprocess.Popen(
        command,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches it through us, once
    )
    try:
        stdout, stderr = process.communicate()
    except BaseException:
        # It ends the Ray and the ranks that it has started.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_TIMEOUT_S)
        process.kill()
        raise
    try:
        reply = json.loads(stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = " | ".join(stderr.strip().splitlines()[-3:]) or "nothing"
        raise MoeRuntimeError(
            f"a started process ended with status {process.returncode}; its last words: {said}"
        ) from None
    if "error" in reply:
        raise (ConfigError if reply["is_users"] else MoeRuntimeError)(reply["error"])
    return reply, spawned


def _result(start: str, runs: Sequence[StartupRun]) -> dict[str, Any]:
    totals = [sum(run.phases_s.values()) for run in runs]
    names = [name for name in PHASES if any(name in run.phases_s for run in runs)]
    medians = {name: median(run.phases_s.get(name, 0.0) for run in runs) for name in names}
    return {
        "start": start,
        "seconds": [round(total, 3) for total in totals],
        "median_s": round(median(totals), 3),
        "driver_cpu_median_s": round(median(run.cpu_s for run in runs), 3),
        "phases_median_s": {name: round(seconds, 3) for name, seconds in medians.items()},
        "phases_s": [{name: round(seconds, 3) for name, seconds in run.phases_s.items()} for run in runs],
    }


def _table(results: Sequence[Mapping[str, Any]], workload: StartupWorkload) -> TextTable:
    phases = [name for name in PHASES if any(name in result["phases_median_s"] for result in results)]
    rows = [
        (name, *(f"{result['phases_median_s'].get(name, 0.0):.2f}" for result in results), PHASES[name])
        for name in phases
    ]
    whole = (f"{result['median_s']:.2f}" for result in results)
    rows.append(("first token after", *whole, f"aim: {AIMS[workload.mode]:g}"))
    cpu = (f"{result['driver_cpu_median_s']:.2f}" for result in results)
    rows.append(("CPU time", *cpu, "of the process itself, without Ray's and the ranks'"))
    return TextTable(
        title=f"{workload.mode}: seconds, medians of {workload.num_runs} processes",
        columns=("phase", *(result["start"] for result in results), "what it is"),
        rows=tuple(rows),
    )
