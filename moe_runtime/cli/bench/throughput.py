"""`moe-runtime bench throughput`: its flags."""

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


def add_parser(benchmarks: Any) -> None:
    """Register the benchmark."""
    parser = benchmarks.add_parser(
        "throughput",
        help="tokens a second of batches of random prompts",
        description="Generate for batches of random prompts, greedily, every request to its full length.",
    )
    add_model_arguments(parser)
    add_random_checkpoint_argument(parser)
    parser.add_argument(
        "--concurrency", type=numbers, metavar="N,N,...", help="requests at once (default: 1,8,32)"
    )
    parser.add_argument("--input-len", type=int, metavar="N", help="tokens of a prompt (default: 128)")
    parser.add_argument("--output-len", type=int, metavar="N", help="tokens generated (default: 128)")
    parser.add_argument(
        "--num-rounds", type=int, metavar="N", help="rounds, of which the median counts (default: 3)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the prompts (default: 0)")
    add_result_arguments(parser)
    add_engine_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run `bench throughput`."""
    from moe_runtime.bench import report, throughput

    check_result_arguments(args)
    workload = given_workload(throughput.ThroughputWorkload, args)
    llm_args = llm_arguments(args)
    with measured_model(llm_args.pop("model"), args.random_checkpoint) as model:
        made = throughput.run_throughput(model, workload, llm_args)
    report.publish(made, args.save_result)
    if args.plot is not None:
        throughput.draw(made.results, made.workload, args.plot)
    return 0
