"""`bench kernels --static`: every Triton kernel compiled for GPUs that need not be here, and its least time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_kernels.aot.compile import CompiledKernel, compile_launch
from moe_kernels.aot.launches import all_launches, table_launches
from moe_kernels.aot.occupancy import MULTIPROCESSORS
from moe_kernels.aot.qwen3_next import EXPERT_PARALLEL_SIZES, qwen3_next_80b
from moe_kernels.aot.roofline import PEAKS, roofline_seconds
from moe_kernels.aot.work import StepLoad, weight_bytes_of, work_of
from moe_kernels.static_launch import StaticLaunch
from moe_runtime.bench.report import Report, TextTable, load_average
from moe_runtime.errors import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
_CONTEXT = 4096
# Tokens of each rank that a kernel's time is for, by a word of its name; the first that fits.
_TOKENS = {"tiny": 1, "decode": 32, "": 4096}


@dataclass(frozen=True, slots=True)
class StaticRow:
    """One launch for one architecture, and the expert-parallel sizes that have it."""

    launch: StaticLaunch
    dtype_name: str
    code: CompiledKernel
    roofline_us: dict[int, float | None]  # by expert-parallel size; None: nobody has counted its work


def run_static(architectures: Sequence[int] | None) -> Report:
    """Compile and report for `architectures` (80 for sm_80), by default for all that are known.

    Raises:
        ConfigError: an architecture that is not known.
        KernelCompileError: a kernel of ours is broken.
    """
    from tqdm import tqdm

    known = {10 * major + minor: (major, minor) for major, minor in MULTIPROCESSORS}
    unknown = [number for number in architectures or () if number not in known]
    if unknown:
        raise ConfigError(f"--architectures has {unknown[0]}; known are {', '.join(map(str, known))}")
    started_load = load_average()
    chosen = [known[number] for number in architectures or known]
    rows: list[StaticRow] = []
    for capability in chosen:
        name = "sm_{}{}".format(*capability)
        launches = tqdm(list(_launches(capability)), desc=f"compiling for {name}", leave=False)
        rows += _rows(launches, capability)
    return Report(
        benchmark="kernels --static",
        device=f"none: compiled for {', '.join(f'sm_{a}{b}' for a, b in chosen)}",
        started_load=started_load,
        workload={
            "model": "Qwen3-Next-80B-A3B",
            "expert_parallel_sizes": _sizes(rows),
            "tokens_per_rank": {name or "otherwise": count for name, count in _TOKENS.items()},
            "decode_context": _CONTEXT,
            "peaks": {peak.name: peak.source for peak in map(PEAKS.__getitem__, chosen)},
        },
        results=[_to_dict(row) for row in rows],
        tables=[_table(capability, rows) for capability in chosen],
    )


def _launches(capability: tuple[int, int]) -> Iterator[tuple[StaticLaunch, str, int]]:
    """Each launch with the type of the experts' weights and the expert-parallel size; some come twice."""
    for dtype_name, dtype in DTYPES.items():
        for size in EXPERT_PARALLEL_SIZES:
            for launch in all_launches(qwen3_next_80b(size), dtype, capability):
                yield launch, dtype_name, size
    names = {dtype: name for name, dtype in DTYPES.items()}
    for launch, dtype, local_experts in table_launches(capability):
        yield launch, names[dtype], qwen3_next_80b(1).num_experts // local_experts


def _rows(
    launches: Iterable[tuple[StaticLaunch, str, int]], capability: tuple[int, int]
) -> Iterable[StaticRow]:
    """Compile; launches that differ in nothing but the times for their expert-parallel sizes share a row."""
    found: dict[tuple[object, ...], StaticRow] = {}
    for launch, dtype_name, size in launches:
        code = compile_launch(launch, capability)
        key = (launch.name, dtype_name, launch.tile, launch.num_stages, code)
        row = found.setdefault(key, StaticRow(launch, dtype_name, code, {}))
        row.roofline_us[size] = _roofline_us(launch, DTYPES[dtype_name], size, capability)
    return found.values()


def _roofline_us(
    launch: StaticLaunch, dtype: torch.dtype, size: int, capability: tuple[int, int]
) -> float | None:
    tokens = next(count for word, count in _TOKENS.items() if word in launch.name)
    shapes = qwen3_next_80b(size)
    load = StepLoad(shapes=shapes, num_tokens=tokens, context=_CONTEXT, weight_bytes=weight_bytes_of(dtype))
    work = work_of(launch.name, load)
    return None if work is None else 1e6 * roofline_seconds(work, PEAKS[capability], dtype)


def _to_dict(row: StaticRow) -> dict[str, Any]:
    code = row.code
    return {
        "kernel": row.launch.name,
        "weights": row.dtype_name,
        "architecture": "sm_{}{}".format(*code.capability),
        "tile": row.launch.tile,
        "num_warps": code.num_warps,
        "num_stages": row.launch.num_stages,
        "registers": code.registers,
        "spilled_bytes": code.spilled_bytes,
        "shared_memory": code.shared_memory,
        "blocks_per_multiprocessor": code.blocks,
        "bytes_in_flight": code.bytes_in_flight,
        "mma": code.mma,
        "float8_mma": code.float8_mma,
        "copies": list(code.copies),
        "roofline_us": {str(size): _rounded(time) for size, time in row.roofline_us.items()},
    }


def _rounded(time: float | None) -> float | None:
    return None if time is None else round(time, 3)


def _table(capability: tuple[int, int], rows: Sequence[StaticRow]) -> TextTable:
    peak = PEAKS[capability]
    sizes = _sizes(rows)
    return TextTable(
        title=(
            f"sm_{capability[0]}{capability[1]}; EP n: least microseconds on {peak.name}, "
            f"{peak.bytes_per_s / 1e12:g} TB/s and {peak.bf16_flops / 1e12:g} TFLOP/s in bfloat16"
        ),
        columns=(
            "kernel",
            "tile",
            "warps",
            "regs",
            "spill",
            "smem KB",
            "blocks/SM",
            "KB in flight",
            "instructions",
            *(f"EP {size}" for size in sizes),
        ),
        rows=tuple(_cells(row, sizes) for row in rows if row.code.capability == capability),
    )


def _sizes(rows: Iterable[StaticRow]) -> list[int]:
    """Expert-parallel sizes of any row: the usual ones, and what a table was tuned for."""
    return sorted({size for row in rows for size in row.roofline_us})


def _cells(row: StaticRow, sizes: Sequence[int]) -> tuple[str, ...]:
    code = row.code
    times = (row.roofline_us.get(size) for size in sizes)
    return (
        row.launch.name + (" fp8" if row.dtype_name == "float8_e4m3fn" else ""),
        row.launch.tile,
        str(code.num_warps),
        str(code.registers),
        str(code.spilled_bytes),
        f"{code.shared_memory / 1024:.0f}",
        str(code.blocks),
        f"{code.bytes_in_flight / 1024:.0f}" if code.bytes_in_flight else "-",
        code.instructions,
        *("-" if time is None else f"{time:.1f}" if time >= 1 else f"{time:.2f}" for time in times),
    )
