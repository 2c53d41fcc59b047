"""Flags that set up a deployment, shared by every command that starts one; names as in vLLM."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from moe_runtime.config import EngineConfig

_HELP = {
    "expert_parallel_size": "ranks to divide the experts over",
    "device": "auto takes GPUs where the cluster has them",
    "dtype": "auto keeps the checkpoint's own",
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
    "placement_timeout_s": "seconds to wait for resources that others use",
    "process_group_timeout_s": "seconds after which a collective gives up on a silent rank",
}
_TYPES = {"int": int, "int | None": int, "float": float, "str": str}


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
            metavar="N" if str(field.type) != "str" else field.name.upper(),
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
