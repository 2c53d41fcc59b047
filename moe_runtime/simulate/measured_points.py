"""MeasuredPoint: what `bench throughput` and `bench scaling` measured on CPU ranks, read from their JSON files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.modelfiles import resolve_model
from moe_runtime.simulate.measured_kernels import read_result
from moe_runtime.simulate.models import SimModel, from_config

BATCH, PREFILL, DECODE = "batch", "prefill", "decode"
_WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint:
    """One deployment with one number of requests, in one phase."""

    path: str  # of the file
    model: SimModel
    num_ranks: int
    threads_per_rank: int
    # This one rank has the threads of so many, with which it is compared; None: it is one of those that grow.
    same_cores_as: int | None
    requests: int  # at once, of all ranks
    input_len: int
    output_len: int
    phase: str  # BATCH: output tokens of whole batches, prefill time included; or PREFILL or DECODE alone
    tokens_per_s: float  # of the deployment; prompt tokens of a prefill
    parts_ms: Mapping[str, float] | None  # of a step, mean over ranks; None: not measured
    load_average: float  # before the run: above 0, others computed too


def read_points(paths: Sequence[str]) -> list[MeasuredPoint]:
    """All points of all files.

    Raises:
        ConfigError: a file is of another benchmark, of GPUs, or of a model that cannot be simulated.
    """
    return [point for path in paths for point in _read_file(path)]


def _read_file(path: str) -> Iterator[MeasuredPoint]:
    report = read_result(path, "throughput", "scaling")
    workload = report["workload"]
    if workload["dtype"] not in _WEIGHT_BYTES:
        raise ConfigError(
            f"{path}: dtype must be one of {', '.join(_WEIGHT_BYTES)}, got {workload['dtype']!r}"
        )
    if "cuda" in report["hardware"]["device"].lower() or "nvidia" in report["hardware"]["device"].lower():
        raise ConfigError(
            f"{path} was measured on {report['hardware']['device']}; --measured compares CPU ranks"
        )
    common = {
        "path": path,
        "model": _model(workload["model"], _WEIGHT_BYTES[workload["dtype"]]),
        "input_len": workload["input_len"],
        "output_len": workload["output_len"],
        "load_average": report["hardware"]["load_average_before"],
    }
    points = _batches if report["benchmark"] == "throughput" else _phases
    yield from points(report, common)


def _batches(report: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[MeasuredPoint]:
    """Of `bench throughput`: one deployment a file."""
    for result in report["results"]:
        yield MeasuredPoint(
            num_ranks=report["workload"]["expert_parallel_size"],
            threads_per_rank=report["workload"]["threads_per_rank"],
            same_cores_as=None,
            requests=result["concurrency"],
            phase=BATCH,
            tokens_per_s=result["output_tokens_per_s"],
            parts_ms=None,
            **common,
        )


def _phases(report: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[MeasuredPoint]:
    """Of `bench scaling`: prefill and decode of several deployments. Strong and weak scaling may share points."""
    for result in report["results"]:
        yield MeasuredPoint(
            num_ranks=result["expert_parallel_size"],
            threads_per_rank=min(result["threads_per_rank"]),
            same_cores_as=result.get("same_cores_as"),
            requests=result["requests"],
            phase=result["phase"],
            tokens_per_s=result["tokens_per_s"],
            parts_ms=result.get("parts_ms_of_step"),
            **common,
        )


def _model(name: str, weight_bytes: float) -> SimModel:
    """A random checkpoint's preset by the name of its directory, which is gone; else the checkpoint itself."""
    from moe_runtime.bench.checkpoint import PRESETS, preset_config  # imports torch

    last = Path(name).name
    if last in PRESETS:
        config: Mapping[str, Any] = preset_config(last)
    else:
        config = resolve_model(None if last == "demo" else name, config_only=True).config
    return from_config(last, config, linear_bytes=weight_bytes, expert_bytes=weight_bytes)
