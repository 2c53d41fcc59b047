"""`moe-runtime inspect`: what a model is, and what of it fits on devices of a given memory, at each EP size."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_runtime.inspection import Fit, ModelInfo, inspect_model
from moe_runtime.inspection.sizes import format_count, format_size, parse_size

_MAX_SHOWN_EP = 64


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the `inspect` command."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a model is and what fits where",
        description="Show layers, parameters, bytes a rank and sequences that fit; needs no GPU and no weights.",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="directory, config.json or Hub id (default: demo)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--expert-parallel-size", type=int, metavar="N", help="show this EP size too; refused if illegal"
    )
    parser.add_argument(
        "--device-memory", default="80GB", metavar="SIZE", help="of one device (default: 80GB)"
    )
    parser.add_argument(
        "--quantization", metavar="METHOD", help="int8: as if the weights were quantised at load, for CPUs"
    )
    parser.add_argument("--model-class", metavar="MODULE:CLASS", help="class of an unregistered architecture")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="default: 60")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--no-cache", action="store_true", help="inspect anew")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Inspect and print. Raises what `inspect_model` raises, and ConfigError for a bad size."""
    device_memory = parse_size(args.device_memory, "--device-memory")
    info = inspect_model(
        args.model,
        args.expert_parallel_size,
        args.timeout,
        model_class=args.model_class,
        quantization=args.quantization,
        revision=args.revision,
        use_cache=not args.no_cache,
    )
    fits = [info.fit(device_memory, ep) for ep in _ep_sizes(info, args.expert_parallel_size)]
    if args.json:
        print(json.dumps(_as_json(info, device_memory, fits)))
    else:
        _print_report(info, device_memory, fits)
    return 0


def _ep_sizes(info: ModelInfo, asked: int | None) -> list[int]:
    """Powers of two up to 64 that are legal, and the one asked for."""
    largest = min(_MAX_SHOWN_EP, info.legal_ep_sizes[-1])
    sizes = {2**power for power in range(largest.bit_length())}
    return sorted(sizes | ({asked} if asked else set()))


def _as_json(info: ModelInfo, device_memory: int, fits: list[Fit]) -> dict[str, Any]:
    return {
        **info.to_dict(),
        "num_parameters": info.num_parameters,
        "active_parameters": info.active_parameters,
        "weight_bytes": info.weight_bytes,
        "legal_expert_parallel_sizes": [info.legal_ep_sizes[0], info.legal_ep_sizes[-1]],
        "device_memory": device_memory,
        "fits": [
            {
                "expert_parallel_size": fit.expert_parallel_size,
                "weight_bytes_per_rank": fit.weight_bytes,
                "usable_bytes": fit.usable_bytes,
                "cache_bytes": fit.cache_bytes,
                "sequences_per_rank": {str(length): count for length, count in fit.sequences},
                "max_sequence_length": fit.max_sequence_length,
                "reason": fit.reason,
            }
            for fit in fits
        ],
    }


def _print_report(info: ModelInfo, device_memory: int, fits: list[Fit]) -> None:
    # A pipe has no width: long lines there are better than cut ones.
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, soft_wrap=True)
    console.print(_facts_table(info))
    console.print(_fits_table(device_memory, fits))
    for fit in fits:
        if fit.reason:
            console.print(f"EP {fit.expert_parallel_size}: {fit.reason}", markup=False)
    for warning in info.warnings:
        console.print(f"warning: {warning}", markup=False)


def _facts_table(info: ModelInfo) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _facts(info).items():
        table.add_row(name, value)
    return table


def _facts(info: ModelInfo) -> dict[str, str]:
    layers = ", ".join(f"{info.layer_types.count(kind)} {kind}" for kind in sorted(set(info.layer_types)))
    shared = info.shared_expert_intermediate_size
    facts = {
        "architecture": info.architecture,
        "class": info.model_class,
        "layers": f"{info.num_layers}: {layers}; {len(info.moe_layers)} with experts",
        "experts": f"{info.num_experts} a layer, top {info.num_experts_per_tok}, intermediate size "
        f"{info.moe_intermediate_size}" + (f"; shared expert {shared}" if shared else "; no shared expert"),
        "parameters": f"{format_count(info.num_parameters)}, {format_count(info.active_parameters)} active a token",
    }
    for kind, count in info.parameters.items():
        facts[f"  {kind}"] = f"{format_count(count)} ({format_size(info.parameter_bytes[kind])})"
    facts |= {
        "weights": f"{format_size(info.weight_bytes)} in {info.dtype}, quantization: {info.quantization or 'none'}",
        "KV cache": f"{format_size(info.kv_bytes_per_token)} a token",
        "state": f"{format_size(info.state_bytes_per_request)} a request",
        "max length": f"{info.max_model_len:,} tokens",
        "vocabulary": f"{info.vocab_size:,}; eos {info.tokenizer.eos_token or list(info.tokenizer.eos_token_ids)}; "
        f"chat template: {'yes' if info.tokenizer.has_chat_template else 'no'}",
        "MTP layers": str(info.num_mtp_layers),
        "modalities": ", ".join(info.modalities),
        "inspected": f"in {info.inspection.seconds:.1f} s, {format_size(info.inspection.peak_rss_bytes)} at most, by "
        f"{info.inspection.interpreter} on {info.inspection.node}",
    }
    return facts


def _fits_table(device_memory: int, fits: list[Fit]) -> Table:
    table = Table(
        title=f"A rank on a device of {format_size(device_memory)} ({format_size(fits[0].usable_bytes)} usable)",
        title_justify="left",
    )
    table.add_column("EP", justify="right")
    table.add_column("weights a rank", justify="right")
    table.add_column("left for caches", justify="right")
    for length, _ in fits[0].sequences:
        table.add_column(f"sequences of {length:,}", justify="right")
    table.add_column("longest sequence", justify="right")
    for fit in fits:
        table.add_row(
            str(fit.expert_parallel_size),
            format_size(fit.weight_bytes),
            format_size(fit.cache_bytes) if fit.fits else "does not fit",
            *(f"{count:,}" for _, count in fit.sequences),
            f"{fit.max_sequence_length:,}",
        )
    return table
