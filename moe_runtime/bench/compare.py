"""`bench compare`: this project and other engines on one checkpoint, with the same prompts and threads, in turns.

All systems are started once and stay; in each round each of them gets the same batch, one after another, while the
others are stopped. So whatever else the machine does meets all alike, and a ratio is that of one round.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_runtime.bench.compare_options import CompareWorkload, PeerOptions
from moe_runtime.bench.compare_rates import rates_of, rates_table, ratio_table
from moe_runtime.bench.ours import OurSystem
from moe_runtime.bench.peers.starting import PeerStarter
from moe_runtime.bench.report import Report, TextTable, load_average
from moe_runtime.bench.turns import Shape, System, Turns, take_turns
from moe_runtime.errors import BenchmarkPeerError, ConfigError
from moe_runtime.modelfiles import resolve_model

logger = logging.getLogger(__name__)


def run_compare(
    model: str | None,
    workload: CompareWorkload,
    options: PeerOptions,
    llm_args: Mapping[str, Any],
    *,
    revision: str | None = None,
    model_class: str | None = None,
) -> Report:
    """Start every system, let them take turns, end them.

    Args:
        model, revision, model_class: as in LLM.
        llm_args: fields of EngineConfig for this project's side, but for its threads.

    Raises:
        ConfigError: a flag is wrong, or a peer that was asked for by name is not there.
        BenchmarkPeerError: a peer that was asked for by name does not start.
        UserError: whatever LLM refuses.
    """
    llm_args = _with_threads(llm_args, workload)
    starter = PeerStarter(options)
    files = resolve_model(model, revision=revision)
    name = Path(files.name).name
    started_load = load_average()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="moe-runtime-"))
        starter.prepare(Path(files.path), name, workload, Path(directory))
        ours = stack.enter_context(OurSystem(str(files.path), llm_args, model_class))
        peers = starter.start(stack)
        facts = {
            "model": name,
            "parameters": ours.num_parameters,
            "our_weights": ours.weights,
            "expert_parallel_size": llm_args.get("expert_parallel_size", 1),
            **asdict(workload),
        }
        systems: list[System] = [ours, *peers]
        failed: dict[str, str] = {}
        measured = [(shape, _measure(systems, shape, workload, ours, failed)) for shape in workload.shapes]
    details = {
        "peers": {peer.name: peer.facts for peer in peers},
        "not_measured": starter.left_out,
        "failed": failed,
    }
    in_float32 = starter.in_float32 if ours.in_float32 else frozenset[str]()
    return Report(
        benchmark="compare",
        device=ours.device,
        started_load=started_load,
        workload=facts,
        **_results(measured, details, in_float32),
    )


def _results(
    measured: Sequence[tuple[Shape, Turns]], details: Mapping[str, Any], in_float32: frozenset[str]
) -> dict[str, Any]:
    """The rates of all turns, and who has none: the fields of Report that hold them."""
    rates = [row for shape, turns in measured for row in rates_of(shape, turns)]
    left_out = [
        *details["not_measured"].items(),
        *((name, f"failed: {why}") for name, why in details["failed"].items()),
    ]
    tables = [
        rates_table(rates),
        ratio_table(rates, in_float32),
        TextTable(title="left out", columns=("peer", "why"), rows=tuple(left_out)),
    ]
    return {
        "results": [row.to_dict() for row in rates],
        "tables": [table for table in tables if table.rows],
        "details": details,
    }


def _with_threads(llm_args: Mapping[str, Any], workload: CompareWorkload) -> dict[str, Any]:
    """Our ranks' arguments: together they have `threads`, and room for the longest workload."""
    if "threads_per_rank" in llm_args:
        raise ConfigError("--threads-per-rank follows from --threads, which all systems get; leave it out")
    ranks = llm_args.get("expert_parallel_size", 1)
    if workload.threads % ranks:
        raise ConfigError(
            f"--threads {workload.threads} does not divide over {ranks} ranks; give a multiple of "
            "--expert-parallel-size"
        )
    return {"max_model_len": workload.max_len, **llm_args, "threads_per_rank": workload.threads // ranks}


def _measure(
    systems: list[System], shape: Shape, workload: CompareWorkload, ours: OurSystem, failed: dict[str, str]
) -> Turns:
    """All rounds of one shape; a peer that fails leaves `systems`, and `failed` says why."""

    def on_failure(system: System, error: BenchmarkPeerError) -> None:
        logger.error("%s, in %s; the others go on", error, shape)
        systems.remove(system)
        failed[system.name] = f"{error} (in {shape})"

    return take_turns(
        list(systems),
        shape,
        num_rounds=workload.num_rounds,
        vocab_size=ours.vocab_size,
        seed=workload.seed,
        on_failure=on_failure,
    )
