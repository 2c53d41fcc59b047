"""`moe-runtime bench overhead`: its flags."""

from __future__ import annotations

import argparse
from typing import Any

from moe_runtime.cli.bench.common import add_result_arguments, check_result_arguments, numbers


def add_parser(benchmarks: Any) -> None:
    """Register the benchmark."""
    parser = benchmarks.add_parser(
        "overhead",
        help="microseconds a step of everything but the model",
        description="Run the whole engine of one rank with a model that computes nothing, and say what its parts cost.",
    )
    parser.add_argument(
        "--num-seqs", type=numbers, metavar="N,N,...", help="running sequences (default: 1,32,256)"
    )
    parser.add_argument(
        "--vocab-size", type=numbers, metavar="N,N,...", help="vocabularies (default: 1024,151936)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="steps to measure (default: 300)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads in the rank (default: 1)")
    add_result_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run `bench overhead`."""
    from moe_runtime.bench import overhead, report

    check_result_arguments(args)
    given = {
        "num_seqs": args.num_seqs,
        "vocab_sizes": args.vocab_size,
        "num_steps": args.steps,
        "threads": args.threads,
    }
    workload = overhead.OverheadWorkload(**{k: v for k, v in given.items() if v is not None})
    made = overhead.run_overhead(workload)
    report.publish(made, args.save_result)
    if args.plot is not None:
        overhead.draw(made.results, args.plot)
    return 0
