"""`bench kernels` on a GPU: a layer of experts against torch, a loop and the roofline; then the other operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from moe_kernels.aot.qwen3_next import qwen3_next_80b
from moe_kernels.aot.roofline import Peak, Work, peak_of
from moe_kernels.device import DeviceProfile
from moe_kernels.shapes import KernelShapes
from moe_runtime.bench.kernels.cases import turns_past_cache
from moe_runtime.bench.kernels.experts_launch import chosen_launch
from moe_runtime.bench.kernels.gpu_experts import (
    FLOAT8,
    ExpertInputs,
    ExpertWeights,
    loop_over_experts,
    make_inputs,
    make_weights,
    ours,
    torch_grouped_mm,
)
from moe_runtime.bench.kernels.gpu_operations import gpu_setting, measure_operations, operations_table
from moe_runtime.bench.kernels.gpu_rates import RATE_COLUMNS, limits_text, rate_cells, rates
from moe_runtime.bench.kernels.gpu_timing import capture, median_seconds
from moe_runtime.bench.report import Report, TextTable, load_average
from moe_runtime.errors import ConfigError

Contender = Callable[[ExpertWeights, ExpertInputs], Callable[[], object]]

TOKENS = (1, 8, 32, 128, 512, 4096)  # of all ranks together
_DTYPES = (torch.bfloat16, FLOAT8)
_CALLS = 4  # different inputs in one graph, at least


def run_gpu(expert_parallel_size: int, num_rounds: int = 9, tokens: Sequence[int] = TOKENS) -> Report:
    """Measure the experts of one of `expert_parallel_size` ranks of Qwen3-Next-80B, and its other operations.

    Raises:
        ConfigError: the experts cannot be shared among so many ranks.
    """
    profile = DeviceProfile.query("cuda")
    shapes = rank_shapes(expert_parallel_size)
    peak = peak_of(profile.name, profile.compute_capability)
    started_load = load_average()
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for dtype in _DTYPES:
            layers = layers_of(shapes, dtype, profile)
            launch = chosen_launch(profile, shapes, dtype)
            for count in tokens:
                inputs = [make_inputs(shapes, count, seed) for seed in range(max(_CALLS, len(layers)))]
                seconds = _measure(layers, inputs, launch, _peers(profile, dtype), num_rounds)
                results += _results(inputs, seconds, shapes, dtype, peak)
        setting = gpu_setting(profile)
        operations = measure_operations(setting, peak, num_rounds)
    return Report(
        benchmark="kernels",
        device=str(profile),
        started_load=started_load,
        workload={
            "model": "Qwen3-Next-80B-A3B",
            "expert_parallel_size": expert_parallel_size,
            "local_experts": shapes.num_local_experts,
            "decode_sequences": setting.decode_sequences,
            "decode_context": setting.context,
            "prefill_tokens": setting.prefill_tokens,
            "num_rounds": num_rounds,
            "peak": "unknown" if peak is None else f"{peak.name}: {peak.source}",
        },
        results=[*results, *operations],
        tables=[_table(results, peak), operations_table(operations, peak)],
    )


def rank_shapes(expert_parallel_size: int) -> KernelShapes:
    """The sizes of one rank.

    Raises:
        ConfigError: the experts cannot be shared among so many ranks.
    """
    num_experts = qwen3_next_80b(1).num_experts
    if num_experts % expert_parallel_size:
        raise ConfigError(
            f"--expert-parallel-size is {expert_parallel_size}; wanted a divisor of {num_experts} experts"
        )
    return replace(qwen3_next_80b(1), num_local_experts=num_experts // expert_parallel_size)


def layers_of(shapes: KernelShapes, dtype: torch.dtype, profile: DeviceProfile) -> list[ExpertWeights]:
    """As many layers' weights as must take turns for each to be out of the cache when it comes again."""
    per_layer = (
        shapes.num_local_experts * 3 * shapes.moe_intermediate_size * shapes.hidden_size * dtype.itemsize
    )
    count = turns_past_cache(per_layer, profile.l2_bytes or 0)
    return [make_weights(shapes, dtype) for _ in range(count)]


def _peers(profile: DeviceProfile, dtype: torch.dtype) -> dict[str, Contender]:
    """What is measured beside our own: nothing in torch takes float8 weights with scales of 128 x 128 blocks."""
    if dtype == FLOAT8:
        return {}
    # On other GPUs grouped_mm asks the device for the group sizes, and no graph can hold that.
    has_grouped_mm = (9, 0) <= (profile.compute_capability or (0, 0)) < (11, 0)
    grouped = {"grouped_mm": torch_grouped_mm} if has_grouped_mm else {}
    return {**grouped, "loop": loop_over_experts}


def _measure(
    layers: Sequence[ExpertWeights],
    inputs: Sequence[ExpertInputs],
    launch: Any,
    peers: Mapping[str, Contender],
    num_rounds: int,
) -> dict[str, float]:
    """Seconds of one layer's experts, for each way of computing them."""
    contenders: dict[str, Contender] = {"moe_runtime": partial(ours, launch=launch), **peers}
    graphs = {
        name: capture([make(layers[i % len(layers)], some) for i, some in enumerate(inputs)])
        for name, make in contenders.items()
    }
    seconds = median_seconds(graphs, num_rounds)
    return {name: value / len(inputs) for name, value in seconds.items()}


def _results(
    inputs: Sequence[ExpertInputs],
    seconds: dict[str, float],
    shapes: KernelShapes,
    dtype: torch.dtype,
    peak: Peak | None,
) -> list[dict[str, Any]]:
    works = [some.work(shapes, dtype) for some in inputs]
    work = Work(
        sum(w.flops for w in works) / len(works),
        sum(w.num_bytes for w in works) / len(works),
    )
    weights = str(dtype).removeprefix("torch.")
    tokens = inputs[0].x_GH.shape[0]
    return [
        {
            "kernel": f"experts, {weights}, {tokens} tokens",
            "tokens": tokens,
            "weights": weights,
            "implementation": name,
            **rates(value, work, peak, dtype),
        }
        for name, value in seconds.items()
    ]


def _table(results: Sequence[dict[str, Any]], peak: Peak | None) -> TextTable:
    return TextTable(
        title=f"One layer's experts, from CUDA graphs{limits_text(peak)}",
        columns=("tokens, weights, implementation", *RATE_COLUMNS),
        rows=tuple(
            (f"{r['tokens']} tokens, {r['weights']}, {r['implementation']}", *rate_cells(r)) for r in results
        ),
    )
