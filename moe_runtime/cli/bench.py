"""`moe-runtime bench`: measurements, each with hardware, workload, a table and a JSON object as the last line."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import fields
from typing import Any

from moe_runtime.cli.engine_args import add_engine_arguments, add_model_arguments, llm_arguments
from moe_runtime.errors import ConfigError


def add_parser(commands: Any) -> None:
    """Register the command and its benchmarks."""
    parser = commands.add_parser("bench", help="measure")
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    _add_overhead(benchmarks)
    _add_throughput(benchmarks)


def _add_overhead(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "overhead",
        help="microseconds a step of everything but the model",
        description="Run the whole engine of one rank with a model that computes nothing, and say what its parts cost.",
    )
    parser.add_argument(
        "--num-seqs", type=_numbers, metavar="N,N,...", help="running sequences (default: 1,32,256)"
    )
    parser.add_argument(
        "--vocab-size", type=_numbers, metavar="N,N,...", help="vocabularies (default: 1024,151936)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="steps to measure (default: 300)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads in the rank (default: 1)")
    _add_save_result(parser)
    parser.set_defaults(func=run_overhead)


def _add_throughput(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "throughput",
        help="tokens a second of batches of random prompts",
        description="Generate for batches of random prompts, greedily, every request to its full length.",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--random-checkpoint", metavar="PRESET", help="measure a random checkpoint: peers-536m or tiny"
    )
    parser.add_argument(
        "--concurrency", type=_numbers, metavar="N,N,...", help="requests at once (default: 1,8,32)"
    )
    parser.add_argument("--input-len", type=int, metavar="N", help="tokens of a prompt (default: 128)")
    parser.add_argument("--output-len", type=int, metavar="N", help="tokens generated (default: 128)")
    parser.add_argument(
        "--num-rounds", type=int, metavar="N", help="rounds, of which the median counts (default: 3)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the prompts (default: 0)")
    parser.add_argument("--compare", metavar="PEER", help="measure a peer in turns with us: transformers")
    parser.add_argument("--compare-dtype", metavar="DTYPE", help="the peer's (default: float32)")
    parser.add_argument(
        "--compare-experts", metavar="KIND", help="transformers' experts implementation (default: grouped_mm)"
    )
    _add_save_result(parser)
    add_engine_arguments(parser)
    parser.set_defaults(func=run_throughput)


def _add_save_result(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save-result", metavar="FILE", help="write the JSON object there as well")


def run_overhead(args: argparse.Namespace) -> int:
    """Run `bench overhead`."""
    from moe_runtime.bench import overhead, report

    report.check_writable(args.save_result)
    given = {
        "num_seqs": args.num_seqs,
        "vocab_sizes": args.vocab_size,
        "num_steps": args.steps,
        "threads": args.threads,
    }
    workload = overhead.OverheadWorkload(**{k: v for k, v in given.items() if v is not None})
    report.publish(overhead.run_overhead(workload), args.save_result)
    return 0


def run_throughput(args: argparse.Namespace) -> int:
    """Run `bench throughput`."""
    from moe_runtime.bench import report, throughput

    report.check_writable(args.save_result)
    given = {field.name: getattr(args, field.name) for field in fields(throughput.ThroughputWorkload)}
    workload = throughput.ThroughputWorkload(**{k: v for k, v in given.items() if v is not None})
    llm_args = llm_arguments(args)
    model = llm_args.pop("model")
    if args.random_checkpoint is None:
        report.publish(throughput.run_throughput(model, workload, llm_args), args.save_result)
        return 0
    if model is not None:
        raise ConfigError(
            f"give MODEL or --random-checkpoint, not both; got {model} and {args.random_checkpoint}"
        )
    from moe_runtime.bench.checkpoint import make_random_checkpoint

    with tempfile.TemporaryDirectory(prefix="moe-runtime-") as directory:
        path = make_random_checkpoint(f"{directory}/{args.random_checkpoint}", args.random_checkpoint)
        report.publish(throughput.run_throughput(str(path), workload, llm_args), args.save_result)
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 1,8,32") from None
