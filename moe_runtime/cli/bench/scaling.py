"""`moe-runtime bench scaling`: its flags."""

from __future__ import annotations

import argparse
from typing import Any

from moe_runtime.cli.bench.common import (
    add_random_checkpoint_argument,
    add_result_arguments,
    check_result_arguments,
    given_workload,
    measured_model,
    numbers,
)
from moe_runtime.cli.engine_args import add_engine_arguments, add_model_arguments, llm_arguments
from moe_runtime.errors import ConfigError


def add_parser(benchmarks: Any) -> None:
    """Register the benchmark."""
    parser = benchmarks.add_parser(
        "scaling",
        help="throughput for growing numbers of ranks, and where the loss goes",
        description="Give deployments of several sizes the same work, in turns, and attribute what is missing to "
        "perfect scaling to the parts of a step.",
    )
    add_model_arguments(parser)
    add_random_checkpoint_argument(parser)
    _add_workload_arguments(parser)
    parser.add_argument(
        "--replay-routing", metavar="FILE", help="choose experts as a trace of `bench routing` says"
    )
    parser.add_argument("--report", metavar="FILE", help="write a Markdown report there as well")
    add_result_arguments(parser)
    add_engine_arguments(parser)
    parser.set_defaults(func=run)


def _add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of ScalingWorkload."""
    parser.add_argument(
        "--expert-parallel-sizes", type=numbers, metavar="N,N,...", help="ranks to compare (default: 1,2)"
    )
    parser.add_argument(
        "--mode", metavar="MODE", help="strong (same work in all), weak (same work a rank) or both (default)"
    )
    parser.add_argument(
        "--concurrency", type=int, metavar="N", help="requests at once of the smallest size (default: 32)"
    )
    parser.add_argument("--input-len", type=int, metavar="N", help="tokens of a prompt (default: 128)")
    parser.add_argument(
        "--output-len", type=int, metavar="N", help="tokens generated; 1 measures prefill alone (default: 64)"
    )
    parser.add_argument(
        "--num-rounds", type=int, metavar="N", help="rounds, of which the median counts (default: 5)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the prompts (default: 0)")
    parser.add_argument(
        "--same-cores",
        action="store_true",
        help="also measure one rank with as many threads as all ranks together; needs --threads-per-rank",
    )
    parser.add_argument(
        "--interleave",
        action=argparse.BooleanOptionalAction,
        help="keep all deployments alive and take turns (default: yes, on GPUs only where they suffice for all)",
    )


def run(args: argparse.Namespace) -> int:
    """Run `bench scaling`."""
    from moe_runtime.bench import report
    from moe_runtime.bench.scaling.markdown import write_markdown
    from moe_runtime.bench.scaling.run import run_scaling
    from moe_runtime.bench.scaling.workload import ScalingWorkload

    check_result_arguments(args)
    report.check_writable(args.report, "--report")
    workload = given_workload(ScalingWorkload, args)
    llm_args = llm_arguments(args)
    if llm_args.pop("expert_parallel_size", None) is not None:
        raise ConfigError("bench scaling takes --expert-parallel-sizes N,N,..., not --expert-parallel-size")
    with measured_model(llm_args.pop("model"), args.random_checkpoint) as model:
        made = run_scaling(model, workload, llm_args, args.replay_routing)
    report.publish(made, args.save_result)
    if args.plot is not None:
        from moe_runtime.bench.scaling.figure import draw

        draw(made.results, args.plot)
    if args.report is not None:
        write_markdown(made, args.report, args.plot)
    return 0
