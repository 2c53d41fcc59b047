"""`moe-runtime bench startup`: its flags."""

from __future__ import annotations

import argparse
from typing import Any

from moe_runtime.cli.bench.common import (
    add_random_checkpoint_argument,
    add_result_arguments,
    check_result_arguments,
    given_workload,
    measured_model,
)
from moe_runtime.cli.engine_args import add_engine_arguments, add_model_arguments, llm_arguments


def add_parser(benchmarks: Any) -> None:
    """Register the benchmark."""
    parser = benchmarks.add_parser(
        "startup",
        help="seconds from the start of a process to its first token",
        description="Start fresh processes that each generate one token, and say where the time goes.",
    )
    add_model_arguments(parser)
    add_random_checkpoint_argument(parser)
    parser.add_argument(
        "--mode",
        metavar="MODE",
        help="own-ray (default): each process starts Ray and the ranks; running-ray: it starts ranks on the Ray of "
        "RAY_ADDRESS, or on one started for this; attach: it finds a deployment started for this",
    )
    parser.add_argument(
        "--num-runs", type=int, metavar="N", help="processes without caches, and with them (default: 3)"
    )
    add_result_arguments(parser)
    add_engine_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run `bench startup`."""
    from moe_runtime.bench import report
    from moe_runtime.bench.startup.run import AIMS, StartupWorkload, run_startup
    from moe_runtime.config import EngineConfig

    check_result_arguments(args)
    workload = given_workload(StartupWorkload, args)
    llm_args = llm_arguments(args)
    model_args = {name: llm_args.pop(name) for name in ("model", "revision", "model_class")}
    EngineConfig.from_kwargs(llm_args)  # refused here rather than by the first process
    with measured_model(model_args.pop("model"), args.random_checkpoint) as model:
        result = run_startup(model, workload, {**model_args, **llm_args})
    report.publish(result, args.save_result)
    if args.plot is not None:
        from moe_runtime.bench.startup.figure import plot_startup

        plot_startup(result.results, workload.mode, AIMS[workload.mode], args.plot)
    return 0
