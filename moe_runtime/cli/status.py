"""`moe-runtime status [NAME]`: what runs on the cluster, or the ranks of one deployment."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from moe_runtime.rank_spec import RankReport, RankStats
    from moe_runtime.status import DeploymentStatus, DeploymentSummary

# Width of a table that goes into a file or a pipe, where there is no terminal to ask.
_FILE_WIDTH = 200


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "status",
        help="what runs on the cluster",
        description="List the cluster's deployments, or the ranks of the named one. With a name, the exit status "
        "is 0 if it runs and every rank answers, 1 if not, 2 if there is none of that name.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a named deployment")
    parser.add_argument(
        "--verbose", action="store_true", help="with NAME: each rank's kernels and dispatcher"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from moe_runtime.connecting import ensure_ray
    from moe_runtime.status import deployment_status, list_deployments

    connected = ensure_ray(must_outlive_us=True)
    try:
        if args.name is None:
            _show_all(list_deployments(), as_json=args.json)
            return 0
        status = deployment_status(args.name)
    finally:
        if connected:
            import ray

            ray.shutdown()
    _show_one(status, as_json=args.json, verbose=args.verbose)
    if not status.serves:
        print(f"moe-runtime: {args.name} does not serve: {status.problem}", file=sys.stderr)
    return 0 if status.serves else 1


def _show_all(deployments: list[DeploymentSummary], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"deployments": [dataclasses.asdict(deployment) for deployment in deployments]}))
    elif not deployments:
        print("no deployment is running")
    else:
        rows: list[list[object]] = [
            [d.name or "(unnamed)", d.model or "?", d.num_ranks or "?", ", ".join(d.nodes), _state_text(d)]
            for d in deployments
        ]
        _print_table(("name", "model", "ranks", "nodes", "state"), rows)


def _state_text(deployment: DeploymentSummary) -> str:
    return deployment.state + (f": {deployment.reason}" if deployment.reason else "")


def _show_one(status: DeploymentStatus, *, as_json: bool, verbose: bool) -> None:
    if as_json:
        print(json.dumps(_as_json(status)))
        return
    summary = status.summary
    print(f"{summary.name}: {summary.model or '?'}, {summary.num_ranks or '?'} ranks, {_state_text(summary)}")
    if not status.reports:
        return
    stats_of_rank = {stats.rank: stats for stats in status.stats}
    rows = [[*_report_cells(r), *_stats_cells(stats_of_rank.get(r.rank))] for r in status.reports]
    _print_table((*_REPORT_COLUMNS, *_STATS_COLUMNS), rows)
    if verbose:
        for report in status.reports:
            print(f"\nrank {report.rank} (node {report.node_ip}, pid {report.pid}), {report.threads} threads")
            print(f"  tokens travel by {report.dispatcher}")
            for line in report.kernel_plan:
                print(f"  {line}")


_REPORT_COLUMNS = ("rank", "node", "device", "GPU", "experts", "weights", "caches", "cache tokens")
_STATS_COLUMNS = ("running", "waiting", "steps", "prompt tokens", "output tokens")


def _report_cells(report: RankReport) -> list[object]:
    memory = [_bytes_text(report.weight_bytes), _bytes_text(report.cache_bytes)]
    gpus = ",".join(report.gpu_ids) or "-"
    return [
        report.rank,
        report.node_ip,
        report.device,
        gpus,
        report.num_local_experts,
        *memory,
        report.cache_tokens,
    ]


def _stats_cells(stats: RankStats | None) -> list[object]:
    if stats is None:
        return ["?"] * len(_STATS_COLUMNS)
    loop = [int(stats.loop[name]) for name in ("steps", "prompt_tokens", "generation_tokens")]
    return [stats.scheduler["num_running"], stats.scheduler["num_waiting"], *loop]


def _as_json(status: DeploymentStatus) -> dict[str, Any]:
    stats_of_rank = {stats.rank: dataclasses.asdict(stats) for stats in status.stats}
    return {
        **dataclasses.asdict(status.summary),
        "serves": status.serves,
        "problem": status.problem,
        "ranks": [{**dataclasses.asdict(r), "stats": stats_of_rank.get(r.rank)} for r in status.reports],
    }


def _bytes_text(count: int) -> str:
    """`"1.5 GiB"`."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


def _print_table(columns: tuple[str, ...], rows: list[list[object]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in columns:
        words = column in ("name", "model", "nodes", "node", "state", "device", "GPU")
        table.add_column(column, justify="left" if words else "right")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console: Console = Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)
    console.print(table)
