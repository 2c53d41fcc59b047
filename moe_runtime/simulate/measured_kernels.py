"""MeasuredExperts: times of the routed experts from `bench kernels --save-result`, in place of the roofline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from moe_runtime.errors import ConfigError
from moe_runtime.simulate.hardware import CPU_THREAD, Hardware

_OURS = "moe_runtime"
_BYTES = {"bfloat16": 2.0, "float8_e4m3fn": 1.0}
# The sizes that `bench kernels` measures on GPUs: Qwen3-Next-80B's experts.
_HIDDEN, _INTERMEDIATE = 2048, 512


@dataclass(frozen=True, slots=True)
class MeasuredExperts:
    """Seconds of one layer's experts against rows on the rank, for the numbers of local experts that were measured.

    Keys are (local experts, bytes of a weight); values are rows, ascending, and seconds.
    """

    tables: Mapping[tuple[int, float], tuple[tuple[float, ...], tuple[float, ...]]] = field(
        default_factory=dict
    )

    def seconds(
        self, hidden: int, intermediate: int, local_experts: int, weight_bytes: float, rows: np.ndarray
    ) -> np.ndarray | None:
        """Seconds for each of `rows` [R], between measured points in proportion; None where not measured.

        Nothing is guessed outside what was measured: one rank beyond the last point and the roofline decides.
        """
        table = self.tables.get((local_experts, weight_bytes))
        if table is None or (hidden, intermediate) != (_HIDDEN, _INTERMEDIATE) or rows.max() > table[0][-1]:
            return None
        return np.interp(rows, table[0], table[1])


def read_measured_experts(paths: Sequence[str]) -> MeasuredExperts:
    """Tables of GPU runs of `bench kernels`, one file for each EP size.

    Raises:
        ConfigError: a file cannot be read, or is of another benchmark or of a CPU.
    """
    tables: dict[tuple[int, float], tuple[tuple[float, ...], tuple[float, ...]]] = {}
    for path in paths:
        report = read_result(path, "kernels")
        local = report["workload"].get("local_experts")
        if local is None:
            raise ConfigError(
                f"{path} was measured on a CPU; --measured-kernels wants `bench kernels` on a GPU"
            )
        for weights, size in _BYTES.items():
            points = sorted(
                (r["tokens"] * 10 * local / 512, r["us"] / 1e6)
                for r in report["results"]
                if r.get("weights") == weights and r["implementation"] == _OURS
            )
            if points:
                rows, seconds = zip(*points, strict=True)
                tables[local, size] = (rows, seconds)
    return MeasuredExperts(tables)


def read_cpu_thread(path: str) -> Hardware:
    """One thread of the CPU that `bench kernels` was run on: its limits, and what the kernels reach of them.

    Files from before the bandwidth of all threads was measured leave it unlimited.

    Raises:
        ConfigError: the file cannot be read, or is of another benchmark or of a GPU.
    """
    import dataclasses

    report = read_result(path, "kernels")
    workload = report["workload"]
    if "read_gb_per_s" not in workload or "sgemm_gflop_per_s" not in workload:
        raise ConfigError(f"{path} was measured on a GPU; --cpu-kernels wants `bench kernels --device cpu`")
    flops = workload["sgemm_gflop_per_s"] * 1e9
    of_one, of_all = workload["read_gb_per_s"], workload.get("read_gb_per_s_all")
    return dataclasses.replace(
        CPU_THREAD,
        source=f"bench kernels in {path}",
        bytes_per_s=of_one * 1e9,
        # All read no less than one of them, although by their clocks, wall and CPU, they may.
        host_bytes_per_s=None if of_all is None else max(of_one, of_all) * 1e9,
        bf16_flops=flops,
        fp8_flops=flops,
        efficiency=dataclasses.replace(CPU_THREAD.efficiency, **_shares(report["results"])),
    )


# Field of Efficiency -> what the names of its kernels in `bench kernels` begin and end with; the mean counts.
# Rows of int8 weights begin otherwise.
_KERNELS_OF_SHARE = {
    "gemm_bytes": ("linear N=", " T=1"),
    "gemm_flops": ("linear N=", " T=512"),
    "grouped_bytes": ("experts decode ", ""),
    "grouped_flops": ("experts prefill ", ""),
    "stream_bytes": ("gated delta decode ", ""),
    "decode_attention_flops": ("attention decode ", ""),
    "prefill_attention_flops": ("attention decode ", ""),
    "chunked_delta_flops": ("attention decode ", ""),
}


def _shares(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the kernels reach of the machine's limits; those that were not measured are left as they are."""
    shares = {}
    for share, (start, end) in _KERNELS_OF_SHARE.items():
        found = [r["share"] for r in results if r["kernel"].startswith(start) and r["kernel"].endswith(end)]
        if found:
            shares[share] = fmean(found)
    return shares


def read_result(path: str, *benchmarks: str) -> Any:
    """What the `--save-result` of one of these benchmarks wrote.

    Raises:
        ConfigError: no such file, no JSON, or another benchmark's.
    """
    try:
        report = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON file: {error}") from error
    found = report.get("benchmark") if isinstance(report, dict) else None
    if found not in benchmarks or "workload" not in report or "results" not in report:
        wanted = " or ".join(f"`bench {name} --save-result`" for name in benchmarks)
        raise ConfigError(f"{path} is of benchmark {found!r}; wanted a file of {wanted}")
    return report
