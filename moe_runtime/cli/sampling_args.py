"""Sampling flags, shared by every command that generates text; names as in vLLM."""

from __future__ import annotations

import argparse
from typing import Any

_FLAGS = {
    "max_tokens": int,
    "min_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "seed": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
}


def add_sampling_arguments(parser: argparse.ArgumentParser, defaults: str) -> None:
    """A flag for each parameter.

    Args:
        defaults: where those come from that are not given.
    """
    group = parser.add_argument_group(f"sampling (defaults come from the {defaults})")
    for name, kind in _FLAGS.items():
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="N" if kind is int else "X")
    group.add_argument("--stop", action="append", metavar="TEXT", help="text that ends the output")
    group.add_argument("--ignore-eos", action="store_true", default=None)


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The parameters that were given, by name."""
    values = {name: getattr(args, name) for name in [*_FLAGS, "stop", "ignore_eos"]}
    return {name: value for name, value in values.items() if value is not None}
