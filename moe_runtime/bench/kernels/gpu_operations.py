"""`bench kernels` on a GPU, all but products: each operation against its roofline and against plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_kernels.aot.qwen3_next import qwen3_next_80b
from moe_kernels.aot.roofline import Peak
from moe_kernels.device import DeviceProfile
from moe_kernels.select import select
from moe_runtime.bench.kernels.cases import Case, Setting
from moe_runtime.bench.kernels.gpu_rates import RATE_COLUMNS, limits_text, rate_cells, rates
from moe_runtime.bench.kernels.gpu_timing import capture, median_seconds
from moe_runtime.bench.kernels.mixer_cases import mixer_cases
from moe_runtime.bench.kernels.token_cases import token_cases
from moe_runtime.bench.report import TextTable

_DTYPE = torch.bfloat16  # of all values; what sums and states are kept in is each operation's own affair


def gpu_setting(profile: DeviceProfile) -> Setting:
    """Sizes of Qwen3-Next-80B and steps as of `--static`; our own kernels, whatever libraries are installed."""
    shapes = qwen3_next_80b(1)
    return Setting(
        device=torch.device(profile.kind),
        plan=select(profile, shapes, _DTYPE),
        shapes=shapes,
        cache_bytes=profile.l2_bytes or 0,
        decode_sequences=32,
        context=4096,
        prefill_tokens=4096,
    )


def measure_operations(setting: Setting, peak: Peak | None, num_rounds: int) -> list[dict[str, Any]]:
    """One result for each operation; dense products are torch's own and have none."""
    return [_measure(case, peak, num_rounds) for case in (*mixer_cases(setting), *token_cases(setting))]


def _measure(case: Case, peak: Peak | None, num_rounds: int) -> dict[str, Any]:
    """Ours must run; why torch's side cannot be captured is said in its place, and no row after it is lost."""
    graphs = {"moe_runtime": capture(case.calls)}
    way = case.torch_way
    try:
        graphs["torch"] = capture(case.torch_calls)
    except RuntimeError as error:  # as CUDA's and torch's own are
        way = f"not run: {(str(error) or type(error).__name__).splitlines()[0]}"
    seconds = {name: s / len(case.calls) for name, s in median_seconds(graphs, num_rounds).items()}
    ours, torchs = seconds["moe_runtime"], seconds.get("torch")
    return {
        "kernel": case.name,
        "implementation": "moe_runtime",
        **rates(ours, case.work, peak, _DTYPE),
        "torch": way,
        "torch_us": None if torchs is None else round(1e6 * torchs, 2),
        "times_torch": None if torchs is None else round(torchs / ours, 3),
    }


def operations_table(results: Sequence[dict[str, Any]], peak: Peak | None) -> TextTable:
    """Of what `measure_operations` returns."""
    return TextTable(
        title=f"The other operations, from CUDA graphs{limits_text(peak)}",
        columns=("operation", *RATE_COLUMNS, "torch us", "times torch", "torch"),
        rows=tuple((r["kernel"], *rate_cells(r), *_torch_cells(r), r["torch"]) for r in results),
    )


def _torch_cells(result: dict[str, Any]) -> tuple[str, str]:
    if result["torch_us"] is None:
        return "-", "-"
    return f"{result['torch_us']:,.1f}", f"{result['times_torch']:.2f}"
