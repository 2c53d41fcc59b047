"""`moe-runtime bench routing`: its flags."""

from __future__ import annotations

import argparse
from typing import Any

from moe_runtime.cli.bench.common import add_result_arguments, check_result_arguments, given_workload, numbers
from moe_runtime.cli.engine_args import add_engine_arguments, add_model_arguments, llm_arguments
from moe_runtime.errors import ConfigError


def add_parser(benchmarks: Any) -> None:
    """Register the benchmark."""
    parser = benchmarks.add_parser(
        "routing",
        help="which experts a text chooses, and how unevenly",
        description="Record the expert choices of a text's tokens in every layer, and say how they are spread.",
    )
    add_model_arguments(parser)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: a page of the package)")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="tokens of the text to compute (default: 4096)"
    )
    parser.add_argument(
        "--window-len", type=int, metavar="N", help="tokens that are computed together (default: 1024)"
    )
    parser.add_argument(
        "--expert-parallel-sizes",
        type=numbers,
        metavar="N,N,...",
        help="numbers of ranks to tell the balancedness for (default: 2,4,8)",
    )
    parser.add_argument("--save-trace", metavar="FILE", help="write the choices there, as .npz")
    parser.add_argument("--replay", metavar="FILE", help="look at recorded choices, without a model")
    add_result_arguments(parser)
    add_engine_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run `bench routing`."""
    from moe_runtime.bench import report
    from moe_runtime.bench.routing.run import RoutingWorkload, run_routing

    check_result_arguments(args)
    report.check_writable(args.save_trace, "--save-trace")
    workload = given_workload(RoutingWorkload, args)
    llm_args = llm_arguments(args)
    model = llm_args.pop("model")
    if workload.replay is not None and model is not None:
        raise ConfigError(f"give MODEL or --replay, not both; got {model} and {workload.replay}")
    made, trace = run_routing(model, workload, llm_args)
    if args.save_trace is not None:
        trace.save(args.save_trace)
    report.publish(made, args.save_result)
    if args.plot is not None:
        from moe_runtime.bench.routing.figure import draw

        draw(trace, made.results, args.plot)
    return 0
