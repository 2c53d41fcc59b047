"""`moe-runtime bench compare`: its flags."""

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
        "compare",
        help="this project beside transformers, vLLM and llama.cpp",
        description="Run transformers, and where installed vLLM and llama.cpp, on the same checkpoint, prompts and "
        "threads, in turns within one run, and print ratios. The flags of the deployment are for this project's side.",
    )
    add_model_arguments(parser)
    add_random_checkpoint_argument(parser)
    _add_workload_arguments(parser)
    _add_peer_arguments(parser)
    add_result_arguments(parser)
    add_engine_arguments(parser)
    parser.set_defaults(func=run)


def _add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--concurrency",
        type=_some_numbers,
        metavar="N,N,...",
        help="requests at once, generating; none for no such workload (default: 1,8,32)",
    )
    group.add_argument("--input-len", type=int, metavar="N", help="tokens of their prompts (default: 128)")
    group.add_argument("--output-len", type=int, metavar="N", help="tokens generated (default: 128)")
    group.add_argument(
        "--prefill-len",
        type=_some_numbers,
        metavar="N,N,...",
        help="tokens of one prompt after which one is generated; none for no such workload (default: 512,2048)",
    )
    group.add_argument(
        "--num-rounds", type=int, metavar="N", help="rounds, of which the median counts (default: 3)"
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="of each system (default: this process' cores)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the prompts (default: 0)")


def _add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("peers")
    group.add_argument(
        "--peers",
        metavar="PEER[:WEIGHTS],...",
        help="transformers:float32|bfloat16, vllm:bfloat16|float16, llama.cpp:f16|bf16|q8_0|f32; one may come several "
        "times with different weights (default: each that is installed, with the first)",
    )
    group.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help="the Python that has a peer, where it cannot share this one",
    )
    group.add_argument(
        "--llama-cpp-converter", metavar="PATH", help="convert_hf_to_gguf.py in llama.cpp's source tree"
    )
    group.add_argument(
        "--gguf-cache", metavar="DIR", help="keep converted checkpoints there for the next run"
    )
    group.add_argument(
        "--tune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let llama.cpp try settings before each workload and keep the fastest (default: --tune)",
    )
    group.add_argument(
        "--peer-timeout-s", type=float, metavar="S", help="that a peer's answer may take (default: 1800)"
    )


def run(args: argparse.Namespace) -> int:
    """Run `bench compare`; 1 if a peer failed after it had begun."""
    from moe_runtime.bench import compare_options, compare_rates, report
    from moe_runtime.bench.compare import run_compare

    check_result_arguments(args)
    workload = given_workload(compare_options.CompareWorkload, args)
    timeout = {} if args.peer_timeout_s is None else {"timeout_s": args.peer_timeout_s}
    options = compare_options.PeerOptions(
        peers=None if args.peers is None else tuple(filter(None, args.peers.split(","))),
        pythons=tuple(args.peer_python),
        converter=args.llama_cpp_converter,
        gguf_cache=args.gguf_cache,
        tune=args.tune,
        **timeout,
    )
    llm_args = llm_arguments(args)
    names = {name: llm_args.pop(name) for name in ("revision", "model_class")}
    with measured_model(llm_args.pop("model"), args.random_checkpoint) as model:
        result = run_compare(model, workload, options, llm_args, **names)
    report.publish(result, args.save_result)
    if args.plot is not None:
        compare_rates.draw(result.results, result.workload, args.plot)
    return 1 if result.details["failed"] else 0


def _some_numbers(text: str) -> tuple[int, ...]:
    return () if text == "none" else numbers(text)
