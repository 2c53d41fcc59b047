"""`moe-runtime bench serve`: its flags, by the names of vLLM's client."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from moe_runtime.cli.bench.common import add_result_arguments, check_result_arguments, decimals
from moe_runtime.cli.client_args import KEY_VARIABLES, given_api_key
from moe_runtime.errors import ConfigError

# Flags that are fields of ServeWorkload or RandomLengths as they are; what is not given has the field's default.
_PLAIN: tuple[tuple[str, type, str, str], ...] = (
    ("--num-prompts", int, "N", "requests in all (default: 1000)"),
    ("--request-rate", float, "RPS", "requests a second (default: inf, all at once)"),
    ("--burstiness", float, "X", "of their arrivals: 1 is a Poisson process, less has bursts (default: 1)"),
    ("--max-concurrency", int, "N", "requests in flight at once (default: no limit)"),
    ("--num-warmups", int, "N", "requests before, which do not count (default: 0)"),
    ("--seed", int, "N", "of prompts and arrivals (default: 0)"),
    ("--temperature", float, "T", "default: 0, greedy"),
)
_DATASET: tuple[tuple[str, type, str, str], ...] = (
    ("--dataset-name", str, "NAME", "random (default), shared-prefix, multi-turn or file"),
    ("--dataset-path", str, "FILE", 'JSON lines of "prompt" or "messages", or ShareGPT\'s JSON'),
    ("--random-vocab-size", int, "N", "random token ids are below it (default: 1000)"),
    ("--output-len", int, "N", "tokens of every answer of a file (default: what the file says)"),
    ("--shared-prefix-num-groups", int, "N", "groups of prompts with one beginning (default: 8)"),
    ("--shared-prefix-len", int, "N", "tokens of a group's beginning (default: 512)"),
    ("--multi-turn-num-conversations", int, "N", "default: --num-prompts divided by the turns"),
    ("--multi-turn-num-turns", int, "N", "turns of a conversation (default: 4)"),
    ("--multi-turn-think-time", float, "S", "seconds between answer and next turn (default: 0)"),
)
_LENGTHS: tuple[tuple[str, type, str, str], ...] = (
    ("--random-input-len", int, "N", "tokens of a random prompt or turn (default: 1024)"),
    ("--random-output-len", int, "N", "tokens of its answer (default: 128)"),
    ("--random-range-ratio", float, "X", "lengths are uniform within this share of them (default: 0)"),
    ("--random-prefix-len", int, "N", "tokens that every random prompt begins with (default: 0)"),
)


def add_parser(benchmarks: Any) -> None:
    """Register the benchmark."""
    parser = benchmarks.add_parser(
        "serve",
        help="latency and throughput of any OpenAI-compatible server under load",
        description="Send requests to a running OpenAI-compatible server, ours or another, and say how fast it "
        "answers. The exit status is 0 if every request succeeded.",
    )
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", metavar="URL", help="default: http://HOST:PORT")
    server.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000")
    server.add_argument(
        "--endpoint", metavar="PATH", help="/v1/completions (default) or /v1/chat/completions"
    )
    server.add_argument("--model", metavar="NAME", help="default: the first that the server has")
    server.add_argument(
        "--api-key", metavar="KEY", help=f"default: {' or '.join(KEY_VARIABLES)} from the environment"
    )
    _add_plain(parser.add_argument_group("data set"), (*_DATASET, *_LENGTHS))
    load = parser.add_argument_group("load")
    _add_plain(load, _PLAIN)
    load.add_argument("--ignore-eos", action="store_true", help="have every answer be as long as it may")
    load.add_argument("--extra-body", metavar="JSON", help="fields to add to every request")
    results = parser.add_argument_group("results")
    results.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS", help="objectives, such as ttft:500 tpot:50"
    )
    results.add_argument(
        "--percentile-metrics", metavar="NAME,...", help="to print (default: ttft,tpot,itl,e2el)"
    )
    results.add_argument("--metric-percentiles", type=decimals, metavar="N,...", help="default: 99")
    add_result_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run `bench serve`."""
    from moe_runtime.bench import report
    from moe_runtime.bench.serving.serve import run_serve

    check_result_arguments(args)
    workload = _workload(args)
    base_url = args.base_url or f"http://{args.host}:{args.port}"
    measured = run_serve(base_url, args.model, given_api_key(args), workload)
    for warning in measured.warnings:
        print(f"moe-runtime: warning: {warning}", file=sys.stderr)
    report.publish(measured.report, args.save_result)
    if args.plot is not None:
        from moe_runtime.bench.serving.figure import plot_run

        title = f"{measured.report.workload['model']}, {workload.dataset_name}, {workload.endpoint}"
        plot_run(measured.records, measured.metrics.duration_s, title, args.plot)
    return 1 if measured.metrics.failed else 0


def _workload(args: argparse.Namespace) -> Any:
    from moe_runtime.bench.serving.metrics import parse_goodput
    from moe_runtime.bench.serving.prompts import RandomLengths
    from moe_runtime.bench.serving.workload import ServeWorkload

    given = {
        **_given(args, (*_PLAIN, *_DATASET)),
        "endpoint": args.endpoint,
        "ignore_eos": args.ignore_eos,
        "goodput": parse_goodput(args.goodput),
        "metric_percentiles": args.metric_percentiles,
        "percentile_metrics": args.percentile_metrics and tuple(args.percentile_metrics.split(",")),
        "extra_body": None if args.extra_body is None else _json_object(args.extra_body),
    }
    lengths = _given(args, _LENGTHS)
    return ServeWorkload(
        lengths=RandomLengths(**{name.removeprefix("random_"): value for name, value in lengths.items()}),
        **{name: value for name, value in given.items() if value is not None},
    )


def _add_plain(group: Any, flags: tuple[tuple[str, type, str, str], ...]) -> None:
    for flag, kind, metavar, text in flags:
        group.add_argument(flag, type=kind, metavar=metavar, help=text)


def _given(args: argparse.Namespace, flags: tuple[tuple[str, type, str, str], ...]) -> dict[str, Any]:
    names = [flag.removeprefix("--").replace("-", "_") for flag, *_ in flags]
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f'--extra-body must be a JSON object such as {{"top_p": 0.9}}, got {text!r}')
    return value
