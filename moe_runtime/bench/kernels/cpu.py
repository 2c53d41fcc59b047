"""`bench kernels` on a CPU: one thread of the native kernels, beside torch and what this machine does at best."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moe_kernels.device import DeviceProfile
from moe_kernels.native.build import NativeBuildError
from moe_kernels.native.library import native_library
from moe_kernels.select import cpu_levels
from moe_runtime.bench.kernels.cases import Case
from moe_runtime.bench.kernels.cpu_cases import all_cases, cpu_setting
from moe_runtime.bench.kernels.cpu_limits import cache_bytes, read_bytes_per_s_of_all, read_calls, sgemm_call
from moe_runtime.bench.kernels.timing import Timing, in_turns, interleaved_medians
from moe_runtime.bench.report import Report, TextTable, load_average
from moe_runtime.errors import ConfigError

_READ, _SGEMM = "read bandwidth", "sgemm"
_READ_ALL = "read bandwidth, all threads together"  # no case's limit: each computes in one thread
_TORCH_BUDGET_S = 1.0  # for all rounds of one case's torch side


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuResult:
    """One case's time, its share of the limit that matters to it, and torch's time."""

    case: Case
    seconds: float
    limit: str  # _READ or _SGEMM
    rate: float  # bytes or floating-point operations a second
    share: float  # of the limit
    torch: Timing


def run_cpu(num_rounds: int = 9, instruction_set: str | None = None) -> Report:
    """Measure all cases with the kernels for `instruction_set`, by default the best that this CPU has.

    Raises:
        ConfigError: there are no native kernels for this CPU or the instruction set, or no compiler for them.
    """
    profile = DeviceProfile.query()
    isa = _instruction_set(profile, instruction_set)
    started_load = load_average()
    with _one_thread():
        chosen = all_cases(cpu_setting(isa), profile)
        reads, read_bytes = read_calls(isa)
        sgemm, sgemm_flops = sgemm_call()
        calls = {**reads, _SGEMM: sgemm, **_calls(chosen)}
        budgets = {_torch_name(case): _TORCH_BUDGET_S for case in chosen}
        timings = interleaved_medians(calls, num_rounds, budgets)
    of_all, num_threads = read_bytes_per_s_of_all(isa, num_rounds)
    limits = {
        _READ: max(read_bytes / timings[name].seconds for name in reads),
        _READ_ALL: of_all,
        _SGEMM: sgemm_flops / timings[_SGEMM].seconds,
    }
    results = [_result(case, timings, limits) for case in chosen]
    return Report(
        benchmark="kernels",
        device=f"{profile}, one thread, {isa}",
        started_load=started_load,
        workload={
            "num_rounds": num_rounds,
            "clock": "CPU time of the thread, medians of interleaved rounds",
            "torch_budget_s": _TORCH_BUDGET_S,
            "l3_bytes": cache_bytes(),
            "read_gb_per_s": round(limits[_READ] / 1e9, 2),
            "read_gb_per_s_all": round(of_all / 1e9, 2),  # by the wall clock
            "read_threads_all": num_threads,
            "sgemm_gflop_per_s": round(limits[_SGEMM] / 1e9, 1),
        },
        results=[_to_dict(result) for result in results],
        tables=[_table(results, limits, num_rounds)],
    )


def _calls(cases: Sequence[Case]) -> dict[str, Callable[[], object]]:
    """Ours and torch's of each case, one right after the other."""
    calls = {}
    for case in cases:
        calls[case.name] = in_turns(case.calls)
        calls[_torch_name(case)] = in_turns(case.torch_calls)
    return calls


def _torch_name(case: Case) -> str:
    return f"torch: {case.name}"


def _instruction_set(profile: DeviceProfile, wanted: str | None) -> str:
    levels = cpu_levels(profile)
    if not levels:
        raise ConfigError(
            f"there are no compiled kernels for {profile.name}; bench kernels needs a CPU with AVX2 and FMA"
        )
    if wanted is not None and wanted not in levels:
        raise ConfigError(f"--instruction-set is {wanted!r}; this CPU has kernels for {', '.join(levels)}")
    try:
        native_library()
    except NativeBuildError as error:
        raise ConfigError(
            f"there are no compiled kernels to measure: {error}; install a C++ compiler"
        ) from error
    return wanted or levels[0]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


def _result(case: Case, timings: Mapping[str, Timing], limits: dict[str, float]) -> CpuResult:
    """The limit that matters is the one that alone would take longer."""
    least = {
        _READ: case.work.num_bytes / limits[_READ],
        _SGEMM: case.work.flops / limits[_SGEMM],
    }
    limit = max(least, key=least.__getitem__)
    done = case.work.num_bytes if limit == _READ else case.work.flops
    seconds = timings[case.name].seconds
    return CpuResult(
        case=case,
        seconds=seconds,
        limit=limit,
        rate=done / seconds,
        share=least[limit] / seconds,
        torch=timings[_torch_name(case)],
    )


def _to_dict(result: CpuResult) -> dict[str, Any]:
    return {
        "kernel": result.case.name,
        "ms": round(1e3 * result.seconds, 4),
        "bytes": round(result.case.work.num_bytes),
        "flops": round(result.case.work.flops),
        "limit": result.limit,
        "rate_per_s": round(result.rate),
        "share": round(result.share, 3),
        "torch": result.case.torch_way,
        "torch_ms": round(1e3 * result.torch.seconds, 4),
        "torch_rounds": result.torch.num_rounds,
        "times_torch": round(result.torch.seconds / result.seconds, 3),
    }


def _table(results: Sequence[CpuResult], limits: dict[str, float], num_rounds: int) -> TextTable:
    reads = [(name, "", f"{limits[name] / 1e9:.1f} GB/s", *[""] * 5) for name in (_READ, _READ_ALL)]
    rows = [*reads, (_SGEMM, "", f"{limits[_SGEMM] / 1e9:.1f} GFLOP/s", *[""] * 5)]
    for result in results:
        unit = "GB/s" if result.limit == _READ else "GFLOP/s"
        cells = (f"{1e3 * result.seconds:.2f}", f"{result.rate / 1e9:.1f} {unit}", result.limit)
        rows.append(
            (result.case.name, *cells, f"{100 * result.share:.0f}%", *_torch_cells(result, num_rounds))
        )
    return TextTable(
        title=f"One thread of {os.cpu_count()}; medians",
        columns=("kernel", "ms", "reached", "limit", "share of it", "torch ms", "times torch", "torch"),
        rows=tuple(rows),
    )


def _torch_cells(result: CpuResult, num_rounds: int) -> tuple[str, str, str]:
    """How many rounds it took part in is said where it was too slow for all of them."""
    few = (
        "" if result.torch.num_rounds == num_rounds else f", {result.torch.num_rounds} of {num_rounds} rounds"
    )
    times = result.torch.seconds / result.seconds
    return f"{1e3 * result.torch.seconds:.2f}", f"{times:.2f}", result.case.torch_way + few
