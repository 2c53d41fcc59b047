"""Microseconds of one dispatch and combine between CPU ranks of this host, for each dispatcher, side by side.

    python -m moe_runtime.bench.dispatch --ranks 2 4 --tokens 1 8 32 256

No expert is computed: the partial sums are the tokens themselves. Dispatchers take turns in short rounds, so that
what else runs on the machine disturbs all of them alike; a round's time is that of its slowest rank, and the table
holds the median round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_models.interfaces import TokenDispatcher
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.parallel.capacity import StepCapacity
from moe_runtime.parallel.dispatch import make_dispatchers
from moe_runtime.parallel.groups import ProcessGroups

KINDS = ("all_gather", "all_to_all", "shared_memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is measured."""

    ranks: int
    tokens: tuple[int, ...]  # of each rank in a step; one row of the table each
    hidden_size: int
    top_k: int
    num_experts: int
    layers: int  # MoE layers of a step, for the time of a whole step
    rounds: int
    seconds_per_round: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Median over rounds; `what` is a number of tokens a rank, "step" or "agree"."""

    ranks: int
    what: str
    kind: str
    microseconds: float


def measure(workload: Workload) -> list[Result]:
    """Start the ranks, measure, and return rank 0's table."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank_main, args=(workload, folder), nprocs=workload.ranks, start_method="spawn")
        results = json.loads((Path(folder) / "results.json").read_text())
    return [Result(**result) for result in results]


def _rank_main(rank: int, workload: Workload, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", workload.ranks)
    cpu = torch.device("cpu")
    groups = ProcessGroups.join(store, rank, workload.ranks, "127.0.0.1", cpu, 120, same_host=True)
    gloo = dataclasses.replace(groups, host=None)
    placement = ExpertPlacement.contiguous(workload.num_experts, workload.ranks)
    capacity = StepCapacity(
        max_tokens=max(workload.tokens),
        hidden_size=workload.hidden_size,
        top_k=workload.top_k,
        dtype=torch.bfloat16,
    )
    makers = {kind: make_dispatchers(kind, groups, placement, capacity, cpu)[0] for kind in KINDS}
    results: list[Result] = []

    def note(what: str, medians: dict[str, float]) -> None:
        results.extend(
            Result(ranks=workload.ranks, what=what, kind=kind, microseconds=1e6 * seconds)
            for kind, seconds in medians.items()
        )

    for tokens in workload.tokens:
        exchanges = {
            kind: _exchange(maker.for_step((tokens,) * workload.ranks), rank, tokens, workload)
            for kind, maker in makers.items()
        }
        note(str(tokens), _take_turns(exchanges, gloo, workload))
        if tokens == workload.tokens[0]:
            steps = {kind: _repeat(exchange, workload.layers) for kind, exchange in exchanges.items()}
            note("step", _take_turns(steps, gloo, workload))
    agreements = {"gloo": gloo, "shared_memory": groups}
    note(
        "agree",
        _take_turns({kind: _agree(how, rank) for kind, how in agreements.items()}, gloo, workload),
    )
    groups.leave()
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps([dataclasses.asdict(r) for r in results]))


def _exchange(dispatcher: TokenDispatcher, rank: int, tokens: int, workload: Workload) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, workload.hidden_size, generator=generator).bfloat16()
    scores = torch.rand(tokens, workload.num_experts, generator=generator)
    weights, ids = scores.topk(workload.top_k)
    weights = weights.bfloat16()

    def exchange() -> None:
        dispatched = dispatcher.dispatch(x, ids, weights)
        dispatcher.combine(dispatched.x_GH, dispatched)

    return exchange


def _agree(groups: ProcessGroups, rank: int) -> Callable[[], None]:
    def agree() -> None:
        groups.agree([rank, 1, 0])

    return agree


def _repeat(call: Callable[[], None], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            call()

    return repeated


def _take_turns(
    calls: dict[str, Callable[[], None]], gloo: ProcessGroups, workload: Workload
) -> dict[str, float]:
    """Median over rounds of the seconds of one call, at the slowest rank of each round."""
    counts = {}
    for kind, call in calls.items():
        first = _slowest(call, 2, gloo)  # warms up; all ranks see the same number
        counts[kind] = max(1, int(workload.seconds_per_round / first))
    rounds: dict[str, list[float]] = {kind: [] for kind in calls}
    for _ in range(workload.rounds):
        for kind, call in calls.items():
            rounds[kind].append(_slowest(call, counts[kind], gloo))
    return {kind: statistics.median(seconds) for kind, seconds in rounds.items()}


def _slowest(call: Callable[[], None], times: int, gloo: ProcessGroups) -> float:
    gloo.agree([0])  # start together
    start = time.perf_counter()
    for _ in range(times):
        call()
    nanoseconds = int((time.perf_counter() - start) / times * 1e9)
    return max(value for (value,) in gloo.agree([nanoseconds])) / 1e9


def _table(results: Sequence[Result], workload: Workload) -> str:
    lines = ["| ranks | tokens a rank | all_gather | all_to_all | shared_memory |", "|---|---|---|---|---|"]
    by_what: dict[str, dict[str, float]] = {}
    for result in results:
        by_what.setdefault(result.what, {})[result.kind] = result.microseconds
    for what, times in by_what.items():
        if what == "agree":
            continue
        label = f"{workload.tokens[0]}, {workload.layers} layers" if what == "step" else what
        lines.append(
            f"| {workload.ranks} | {label} | " + " | ".join(f"{times[k]:,.0f}" for k in KINDS) + " |"
        )
    agree = by_what["agree"]
    lines.append(f"| {workload.ranks} | agreement | {agree['gloo']:,.0f} | | {agree['shared_memory']:,.0f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table for each number of ranks, and one line of JSON at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 256])
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--num-experts", type=int, default=512)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds-per-round", type=float, default=0.1)
    args = parser.parse_args(arguments)
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    print(f"microseconds, bfloat16, hidden {args.hidden_size}, top-{args.top_k}; {machine}")
    everything: list[Result] = []
    for ranks in args.ranks:
        workload = Workload(
            ranks=ranks,
            tokens=tuple(args.tokens),
            hidden_size=args.hidden_size,
            top_k=args.top_k,
            num_experts=args.num_experts,
            layers=args.layers,
            rounds=args.rounds,
            seconds_per_round=args.seconds_per_round,
        )
        results = measure(workload)
        print(_table(results, workload), flush=True)
        everything += results
    print(json.dumps({"machine": machine, "results": [dataclasses.asdict(r) for r in everything]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
