"""`moe-runtime simulate`: what a deployment would reach on hardware that is not here."""

from __future__ import annotations

import argparse
import functools
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from moe_runtime.cli.bench.common import add_result_arguments, check_result_arguments, numbers
from moe_runtime.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from moe_runtime.simulate.deployment import Deployment

_EP_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "simulate",
        help="predict throughput on GPUs that are not here",
        description="Predict tokens/s of a GPU and the parts of a step from formulas and frozen constants, with no GPU "
        "and no weights.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="qwen3-next-80b",
        metavar="MODEL",
        help="qwen3-next-80b (default), deepseek-v3, or a directory, config.json or Hub id of a Qwen3-Next",
    )
    _add_hardware(parser)
    _add_deployment(parser)
    _add_experts(parser)
    _add_workload(parser)
    parser.add_argument(
        "--validate",
        action="store_true",
        help="compare with published figures instead; takes no other setting",
    )
    parser.add_argument(
        "--measured",
        nargs="+",
        metavar="FILE",
        help="compare with `bench scaling`, or with `bench throughput` at each EP size, on CPUs",
    )
    parser.add_argument(
        "--cpu-kernels",
        metavar="FILE",
        help="of --measured: `bench kernels` on that CPU (default: built-in numbers)",
    )
    add_result_arguments(parser)
    parser.set_defaults(func=functools.partial(run, parser))


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("hardware")
    group.add_argument("--gpu", default="H100", metavar="NAME", help="H100 (default), H200, B200 or H800")
    group.add_argument("--gpus-per-node", type=int, metavar="N", help="that NVLink connects (default: 8)")
    group.add_argument("--nvlink-gb-s", type=float, metavar="GB/S", help="of a GPU, one way")
    group.add_argument("--network-gbps", type=float, metavar="GBIT/S", help="of a GPU's card (default: 400)")
    group.add_argument(
        "--exchange-us", type=float, metavar="US", help="of a dispatch or combine without its bytes"
    )
    group.add_argument(
        "--network-latency-us",
        type=float,
        metavar="US",
        help="of one more node in an all_gather or all_to_all (default: 5)",
    )


def _add_deployment(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("deployment")
    group.add_argument(
        "--expert-parallel-sizes",
        type=numbers,
        default=_EP_SIZES,
        metavar="N,N,...",
        help="default: 8 to 1024",
    )
    group.add_argument(
        "--dtype", default="fp8", metavar="DTYPE", help="of weights: fp8 (default) or bfloat16"
    )
    group.add_argument(
        "--dispatch",
        metavar="KIND",
        help="all_gather (default of decode, as this runtime has it), all_to_all (of prefill), deepep_low_latency, "
        "deepep_normal, shared_memory",
    )
    group.add_argument(
        "--dispatch-dtype", default="bfloat16", metavar="DTYPE", help="bfloat16 (default) or fp8"
    )
    group.add_argument(
        "--overlap", action="store_true", help="two half batches: compute one, exchange the other"
    )


def _add_experts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("experts")
    group.add_argument(
        "--routing",
        default="uniform",
        metavar="ROUTING",
        help="uniform (default), zipf:SKEW or a trace (.npz)",
    )
    group.add_argument(
        "--placement", default="contiguous", metavar="KIND", help="contiguous (default) or balanced"
    )
    group.add_argument(
        "--redundant-experts", type=int, default=0, metavar="N", help="copies beyond one (default: 0)"
    )
    group.add_argument(
        "--memory-utilization",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="for weights and caches (default: 0.9)",
    )
    group.add_argument(
        "--measured-kernels",
        nargs="+",
        default=(),
        metavar="FILE",
        help="`bench kernels` on a GPU, for its experts",
    )


def _add_workload(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument("--phase", metavar="PHASE", help="decode (default) or prefill")
    group.add_argument("--input-len", type=int, metavar="N", help="tokens of a prompt (default: 2000)")
    group.add_argument("--output-len", type=int, metavar="N", help="tokens generated (default: 1000)")
    group.add_argument("--tpot-slo-ms", type=float, metavar="MS", help="longest decode step (default: 50)")
    group.add_argument(
        "--batch-per-gpu", dest="batch", type=int, metavar="N", help="sequences, instead of the SLO's"
    )
    group.add_argument("--prefill-tokens", type=int, metavar="N", help="of a GPU in a step (default: 8192)")


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run `simulate`."""
    check_result_arguments(args)
    if args.cpu_kernels and not args.measured:
        raise ConfigError("--cpu-kernels goes with --measured")
    if args.validate:
        _check_alone(parser, args, "--validate")
    elif args.measured:
        _check_alone(parser, args, "--measured", "--cpu-kernels")
    if args.validate:
        _validate(args)
    elif args.measured:
        _compare_measured(args)
    else:
        _sweep(args)
    return 0


def _check_alone(parser: argparse.ArgumentParser, args: argparse.Namespace, *allowed: str) -> None:
    """ConfigError if a setting is given that a comparison does not take."""
    for action in parser._actions:
        name = action.option_strings[0] if action.option_strings else "MODEL"
        given = vars(args).get(action.dest, action.default) != action.default
        if given and name not in (*allowed, "--save-result", "--plot"):
            raise ConfigError(f"{allowed[0]} has its own settings; leave {name} out")


def _validate(args: argparse.Namespace) -> None:
    from moe_runtime.bench import report
    from moe_runtime.simulate.comparison_figure import draw_validation
    from moe_runtime.simulate.validate import assumptions, run_validation

    print("\n".join(assumptions()))
    found = run_validation()
    report.publish(found, args.save_result)
    if args.plot:
        draw_validation(found.results, args.plot)


def _compare_measured(args: argparse.Namespace) -> None:
    from moe_runtime.bench import report
    from moe_runtime.simulate.comparison_figure import draw_measured
    from moe_runtime.simulate.hardware import CPU_THREAD
    from moe_runtime.simulate.measured_kernels import read_cpu_thread
    from moe_runtime.simulate.measured_runs import run_measured

    thread = read_cpu_thread(args.cpu_kernels) if args.cpu_kernels else CPU_THREAD
    found = run_measured(args.measured, thread)
    report.publish(found, args.save_result)
    if args.plot:
        draw_measured(found.results, args.plot)


def _sweep(args: argparse.Namespace) -> None:
    from moe_runtime.bench import report
    from moe_runtime.simulate import sweep
    from moe_runtime.simulate.figure import draw

    given = {field.name: getattr(args, field.name) for field in fields(sweep.SweepWorkload)}
    workload = sweep.SweepWorkload(**{k: v for k, v in given.items() if v is not None})
    deployment = _deployment(args, workload.phase)
    points = sweep.sweep(deployment, sorted(set(args.expert_parallel_sizes)), workload)
    facts = _facts(deployment, workload, args)
    published = sweep.report(points, workload, facts)
    print(published.workload["verdict"])
    report.publish(published, args.save_result)
    if args.plot:
        title = (
            f"{deployment.model.name} on {deployment.hardware.name}, {workload.phase}, {args.routing} routing"
        )
        draw(points, title, args.plot)


def _deployment(args: argparse.Namespace, phase: str) -> Deployment:
    from moe_runtime.simulate.deployment import Deployment
    from moe_runtime.simulate.dispatch import DispatchPlan
    from moe_runtime.simulate.hardware import find_gpu
    from moe_runtime.simulate.measured_kernels import read_measured_experts
    from moe_runtime.simulate.models import find_model
    from moe_runtime.simulate.placement import PLACEMENTS
    from moe_runtime.simulate.routing import Layout, parse_routing

    if args.placement not in PLACEMENTS:
        known = ", ".join(PLACEMENTS)
        raise ConfigError(
            f"--placement must be one of {known}, got {args.placement!r}{did_you_mean(args.placement, PLACEMENTS)}"
        )
    if args.redundant_experts < 0:
        raise ConfigError(f"--redundant-experts must be at least 0, got {args.redundant_experts}")
    model = find_model(args.model, args.dtype)
    hardware = find_gpu(args.gpu).with_overrides(
        gpus_per_node=args.gpus_per_node,
        nvlink_gb_s=args.nvlink_gb_s,
        network_gbps=args.network_gbps,
        exchange_us=args.exchange_us,
        network_latency_us=args.network_latency_us,
    )
    kind = args.dispatch or ("all_to_all" if phase == "prefill" else "all_gather")
    return Deployment(
        model=model,
        hardware=hardware,
        layout=Layout(
            num_ranks=1,
            ranks_per_node=hardware.gpus_per_node,
            placement=args.placement,
            num_redundant=args.redundant_experts,
        ),
        routing=parse_routing(args.routing, model.num_experts, model.top_k),
        dispatch=DispatchPlan(kind=kind, wire_dtype=args.dispatch_dtype),
        overlap=args.overlap,
        memory_utilization=args.memory_utilization,
        measured=read_measured_experts(args.measured_kernels),
    )


def _facts(deployment: Deployment, workload: Any, args: argparse.Namespace) -> dict[str, Any]:
    hardware = deployment.hardware
    return {
        "model": deployment.model.name,
        "dtype": args.dtype,
        "gpu": hardware.name,
        "gpus_per_node": hardware.gpus_per_node,
        "nvlink_gb_per_s": hardware.scale_up.bytes_per_s / 1e9,
        "network_gbps": hardware.scale_out.bytes_per_s * 8 / 1e9,
        "dispatch": deployment.dispatch.kind,
        "dispatch_dtype": deployment.dispatch.wire_dtype,
        "overlap": deployment.overlap,
        "routing": deployment.routing.name,
        "placement": deployment.layout.placement,
        "redundant_experts": deployment.layout.num_redundant,
        **{field.name: getattr(workload, field.name) for field in fields(workload)},
    }
