"""`moe-runtime bench kernels`: its flags, and which of its measurements they ask for."""

from __future__ import annotations

import argparse
from typing import Any

from moe_runtime.cli.bench.common import add_result_arguments, check_result_arguments
from moe_runtime.errors import ConfigError


def add_parser(benchmarks: Any) -> None:
    """Register the benchmark."""
    parser = benchmarks.add_parser(
        "kernels",
        help="what the kernels reach of what the hardware can do",
        description=(
            "Time the kernels on this machine's device beside the device's own limits; with --static, compile the "
            "GPU kernels and say what they use, which needs no GPU."
        ),
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda (default: cuda where there is a GPU)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--static", action="store_true", help="compile the GPU kernels for Qwen3-Next-80B; needs no GPU"
    )
    what.add_argument(
        "--tune", action="store_true", help="search the experts' tiles on this GPU and write the best down"
    )
    parser.add_argument(
        "--architectures",
        type=_architectures,
        metavar="N,N,...",
        help="of --static: 80 for sm_80 (default: all that are known)",
    )
    parser.add_argument(
        "--expert-parallel-size",
        type=int,
        metavar="N",
        help="on a GPU: as many local experts as Qwen3-Next-80B has on one of N ranks (default: 8)",
    )
    parser.add_argument(
        "--instruction-set",
        metavar="NAME",
        help="on a CPU: avx2, avx512, avx512_bf16 or amx (default: the best it has)",
    )
    parser.add_argument("--num-rounds", type=int, metavar="N", help="of which the medians count (default: 9)")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    add_result_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run `bench kernels`."""
    from moe_runtime.bench import report

    _check(args)
    check_result_arguments(args)
    result = _measure(args)
    report.publish(result, args.save_result, json_alone=args.json)
    if args.plot is not None:
        from moe_runtime.bench.kernels.figure import draw

        draw(result.results, result.device, args.plot)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.architectures is not None and not args.static:
        raise ConfigError("--architectures is for --static: without it, this machine's device is measured")
    if args.plot is not None and (args.static or args.tune):
        flag = "--static" if args.static else "--tune"
        raise ConfigError(f"--plot draws kernels' shares of their limits, which {flag} does not measure")
    if args.static and args.device is not None:
        raise ConfigError("--device is not for --static: it compiles and runs nothing")
    if args.device not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device is {args.device!r}; wanted cpu or cuda")
    for flag, value in (
        ("--num-rounds", args.num_rounds),
        ("--expert-parallel-size", args.expert_parallel_size),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} must be at least 1, got {value}")


def _measure(args: argparse.Namespace) -> Any:
    """The report that the flags ask for."""
    if args.static:
        from moe_runtime.bench.kernels.static_table import run_static

        return run_static(args.architectures)
    import torch

    has_gpu = torch.cuda.is_available()
    rounds = {} if args.num_rounds is None else {"num_rounds": args.num_rounds}
    if args.tune or args.device == "cuda" or (args.device is None and has_gpu):
        if not has_gpu or args.device == "cpu":
            flag = "--tune" if args.tune else "--device cuda"
            raise ConfigError(f"{flag} needs a GPU, and this process sees none; --static needs none")
        size = 8 if args.expert_parallel_size is None else args.expert_parallel_size
        if args.tune:
            from moe_runtime.bench.kernels.tune import run_tune

            return run_tune(size, **rounds)
        from moe_runtime.bench.kernels.gpu import run_gpu

        return run_gpu(size, **rounds)
    from moe_runtime.bench.kernels.cpu import run_cpu

    return run_cpu(instruction_set=args.instruction_set, **rounds)


def _architectures(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part.removeprefix("sm_")) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of architectures such as 80,90") from None
