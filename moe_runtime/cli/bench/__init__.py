"""`moe-runtime bench`: measurements, each with hardware, workload, a table and a JSON object as the last line."""

from __future__ import annotations

from typing import Any

from moe_runtime.cli.bench import (
    compare,
    kernels,
    latency,
    overhead,
    routing,
    scaling,
    serve,
    startup,
    throughput,
)


def add_parser(commands: Any) -> None:
    """Register the command and its benchmarks."""
    parser = commands.add_parser("bench", help="measure")
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for benchmark in (serve, throughput, compare, latency, startup, scaling, routing, overhead, kernels):
        benchmark.add_parser(benchmarks)
