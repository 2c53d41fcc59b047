"""Flags that benchmarks share, and the checkpoint that they measure."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

W = TypeVar("W", bound="DataclassInstance")


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    """--save-result and --plot."""
    parser.add_argument("--save-result", metavar="FILE", help="write the JSON object there as well")
    parser.add_argument("--plot", metavar="PREFIX", help="draw the results into PREFIX.png and PREFIX.svg")


def check_result_arguments(args: argparse.Namespace) -> None:
    """Refuse --save-result and --plot that cannot be written, before minutes are spent on what goes into them.

    Raises:
        ConfigError: a directory does not exist, or matplotlib is not installed.
    """
    from moe_runtime.bench import plots, report

    report.check_writable(args.save_result)
    plots.check_plottable(args.plot)


def add_random_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """--random-checkpoint, instead of MODEL."""
    parser.add_argument(
        "--random-checkpoint", metavar="PRESET", help="measure a random checkpoint: peers-536m or tiny"
    )


@contextlib.contextmanager
def measured_model(model: str | None, random_checkpoint: str | None) -> Iterator[str | None]:
    """The checkpoint to measure: `model` as it is, or a random one that lives as long as the context.

    Raises:
        ConfigError: both are given, or there is no such preset.
    """
    if random_checkpoint is None:
        yield model
        return
    if model is not None:
        raise ConfigError(f"give MODEL or --random-checkpoint, not both; got {model} and {random_checkpoint}")
    from moe_runtime.bench.checkpoint import make_random_checkpoint

    with tempfile.TemporaryDirectory(prefix="moe-runtime-") as directory:
        yield str(make_random_checkpoint(f"{directory}/{random_checkpoint}", random_checkpoint))


def given_workload(workload: type[W], args: argparse.Namespace) -> W:
    """A benchmark's workload from the flags that were given, which are named as its fields; it checks them."""
    given = {field.name: getattr(args, field.name) for field in fields(workload)}
    return workload(**{name: value for name, value in given.items() if value is not None})


def numbers(text: str) -> tuple[int, ...]:
    """The type of a flag that takes a list of whole numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 1,8,32") from None


def decimals(text: str) -> tuple[float, ...]:
    """The type of a flag that takes a list of numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 50,99") from None
