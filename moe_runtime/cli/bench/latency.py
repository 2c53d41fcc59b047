"""`moe-runtime bench latency`: its flags, by vLLM's names."""

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
        "latency",
        help="seconds that one batch takes",
        description="Generate for one batch at a time, greedily, every request to its full length.",
    )
    add_model_arguments(parser)
    add_random_checkpoint_argument(parser)
    parser.add_argument("--batch-size", type=int, metavar="N", help="requests of a batch (default: 8)")
    parser.add_argument("--input-len", type=int, metavar="N", help="tokens of a prompt (default: 32)")
    parser.add_argument("--output-len", type=int, metavar="N", help="tokens generated (default: 128)")
    parser.add_argument(
        "--num-iters-warmup", type=int, metavar="N", help="batches that do not count (default: 3)"
    )
    parser.add_argument("--num-iters", type=int, metavar="N", help="batches that count (default: 10)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the prompts (default: 0)")
    add_result_arguments(parser)
    add_engine_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run `bench latency`."""
    from moe_runtime.bench import latency, report

    check_result_arguments(args)
    workload = given_workload(latency.LatencyWorkload, args)
    llm_args = llm_arguments(args)
    with measured_model(llm_args.pop("model"), args.random_checkpoint) as model:
        made = latency.run_latency(model, workload, llm_args)
    report.publish(made, args.save_result)
    if args.plot is not None:
        latency.draw(made.results[0], made.workload, args.plot)
    return 0
