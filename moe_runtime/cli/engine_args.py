"""Flags that set up a deployment, shared by every command that starts one; names as in vLLM."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from moe_runtime.config import EngineConfig

if TYPE_CHECKING:
    from moe_runtime.frontend import Frontend

_HELP = {
    "expert_parallel_size": "ranks to divide the experts over",
    "device": "auto takes GPUs where the cluster has them",
    "dtype": "auto keeps the checkpoint's own",
    "quantization": "int8 quantises the weights while they load, for CPUs; an FP8 checkpoint needs no flag",
    "max_model_len": "tokens of prompt and output together",
    "max_num_seqs": "sequences that a rank runs at once",
    "max_num_batched_tokens": "tokens that a rank computes in one step",
    "max_waiting": "requests that may wait on a rank before more are refused",
    "scheduling_policy": "fcfs: by arrival; priority: by the request's priority, then arrival",
    "enable_prefix_caching": "let prompts skip what an earlier one with the same beginning has computed",
    "state_checkpoint_interval": "tokens of a prompt between kept DeltaNet states",
    "block_size": "tokens in a KV cache block",
    "gpu_memory_utilization": "share of a GPU's memory to use",
    "kv_cache_memory_bytes": "bytes a rank for KV blocks and state slots",
    "threads_per_rank": "CPU threads a rank; by default the node's cores divided by its ranks",
    "dispatcher": "how tokens travel between ranks",
    "inspection_timeout_s": "seconds that the inspection of the model class may take",
    "placement_strategy": "how Ray places ranks on nodes: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD",
    "placement_timeout_s": "seconds to wait for nodes to join, and for resources that others use",
    "process_group_timeout_s": "seconds after which a collective gives up on a silent rank",
}
_TYPES = {"int": int, "int | None": int, "float": float, "str": str, "str | None": str}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --revision, --model-class."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="checkpoint directory or Hub id; by default the demo checkpoint that comes with the package",
    )
    parser.add_argument("--revision", help="revision of a Hub id")
    parser.add_argument("--model-class", metavar="MODULE:CLASS", help="class to use for the model")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of EngineConfig; checked there, so that Python and the command line agree."""
    group = parser.add_argument_group("deployment")
    for field in dataclasses.fields(EngineConfig):
        default = "" if field.default is None else f" (default: {field.default})"
        flag = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=_HELP[field.name] + default)
            continue
        group.add_argument(
            flag,
            type=_TYPES[str(field.type)],
            metavar=field.name.upper() if "str" in str(field.type) else "N",
            help=_HELP[field.name] + default.replace("%", "%%"),
        )


def llm_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `LLM` from parsed flags; flags that were not given stay out."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(EngineConfig)}
    return {
        "model": args.model,
        "revision": args.revision,
        "model_class": args.model_class,
        **{name: value for name, value in given.items() if value is not None},
    }


def start_or_attach(
    args: argparse.Namespace, *, name: str | None = None, keeper: str | None = None
) -> Frontend:
    """The deployment that the flags describe, or the one that --connect names.

    Args:
        name, keeper: of a deployment to start; see `Frontend.start`, whose errors this raises.
    """
    from moe_runtime.frontend import Frontend

    if args.connect is not None:
        return Frontend.attach(args.connect)
    given = llm_arguments(args)
    model = {argument: given.pop(argument) for argument in ("model", "revision", "model_class")}
    config = EngineConfig.from_kwargs(given)
    return Frontend.start(**model, config=config, name=name, use_tqdm=sys.stderr.isatty(), keeper=keeper)
