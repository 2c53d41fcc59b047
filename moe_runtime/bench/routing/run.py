"""`bench routing` from its arguments to its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isnan, log2
from typing import Any

from moe_runtime.bench.report import Report, TextTable, load_average
from moe_runtime.bench.routing.record import read_text, record, recording_args
from moe_runtime.bench.routing.statistics import LayerStatistics, layer_statistics, overall
from moe_runtime.errors import ConfigError
from moe_runtime.experts.trace import RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingWorkload:
    """What `bench routing` looks at."""

    text: str | None = None  # file; None: a page that comes with the package
    replay: str | None = None  # file of a trace to look at, instead of a model
    max_tokens: int = 4096  # of the text
    window_len: int = 1024  # tokens that are computed together
    expert_parallel_sizes: tuple[int, ...] = (2, 4, 8)  # of the balancedness

    def __post_init__(self) -> None:
        for name in ("max_tokens", "window_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.expert_parallel_sizes or min(self.expert_parallel_sizes) < 1:
            raise ConfigError(
                f"expert_parallel_sizes must be whole numbers of at least 1, got {list(self.expert_parallel_sizes)}"
            )
        if self.replay is not None and self.text is not None:
            raise ConfigError("give --text or --replay, not both: a trace needs no text")


def run_routing(
    model: str | None, workload: RoutingWorkload, llm_args: Mapping[str, Any]
) -> tuple[Report, RoutingTrace]:
    """Record a text's choices, or read recorded ones, and say how they are spread.

    Args:
        model: as in LLM; not used where a trace is replayed.
        llm_args: further arguments of LLM.

    Raises:
        UserError: whatever LLM refuses; a text or trace that cannot be read; a model without experts.
    """
    started_load = load_average()
    facts: dict[str, Any] = {}
    if workload.replay is not None:
        trace, device = RoutingTrace.load(workload.replay), "none: a recorded trace"
    else:
        trace, facts, device = _record(model, workload, llm_args)
    sizes = [size for size in workload.expert_parallel_sizes if size <= trace.num_experts]
    statistics = layer_statistics(trace, sizes)
    of_all = overall(trace, sizes)
    report = Report(
        benchmark="routing",
        device=device,
        started_load=started_load,
        workload={
            **facts,
            **asdict(workload),
            "tokens": trace.num_tokens,
            "experts": trace.num_experts,
            "top_k": trace.top_k,
            "max_entropy_bits": round(log2(trace.num_experts), 4),
            "overall_balancedness": {str(size): round(value, 4) for size, value in of_all.items()},
        },
        results=[_result(layer) for layer in statistics],
        tables=[_table(statistics, trace, sizes), _balance_table(of_all)],
    )
    return report, trace


def _record(
    model: str | None, workload: RoutingWorkload, llm_args: Mapping[str, Any]
) -> tuple[RoutingTrace, dict[str, Any], str]:
    """A trace, the facts of the model, and the name of the device."""
    from moe_runtime.llm import LLM

    text = read_text(workload.text)
    with LLM(model, use_tqdm=False, **recording_args(llm_args)) as llm:
        if not llm.info.moe_layers:
            raise ConfigError(f"{llm.files.name} has no experts to choose from; give a mixture of experts")
        token_ids = llm.get_tokenizer().encode(text)[: workload.max_tokens]
        window_len = min(workload.window_len, min(rank.max_model_len for rank in llm.ranks) - 1)
        facts = {
            "model": llm.files.name,
            "dtype": llm.config.dtype if llm.config.dtype != "auto" else llm.info.dtype,
            "expert_parallel_size": llm.config.expert_parallel_size,
        }
        return record(llm, token_ids, window_len), facts, llm.ranks[0].device


def _result(layer: LayerStatistics) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "skew": round(layer.skew, 4),
        "entropy_bits": round(layer.entropy_bits, 4),
        "experts_for_80_percent": layer.experts_for_80_percent,
        "overlap": None if isnan(layer.overlap) else round(layer.overlap, 4),
        "overlap_by_chance": round(layer.overlap_by_chance, 4),
        "balancedness": {str(size): round(value, 4) for size, value in layer.balancedness.items()},
    }


def _table(statistics: list[LayerStatistics], trace: RoutingTrace, sizes: list[int]) -> TextTable:
    columns = ("layer", "max/mean", f"entropy of {log2(trace.num_experts):.2f} bits", "experts for 80%")
    rows = [
        (
            str(layer.layer),
            f"{layer.skew:.2f}",
            f"{layer.entropy_bits:.2f}",
            str(layer.experts_for_80_percent),
            "-" if isnan(layer.overlap) else f"{layer.overlap:.1%}",
            f"{layer.overlap_by_chance:.1%}",
            *(f"{layer.balancedness[size]:.2f}" for size in sizes),
        )
        for layer in statistics
    ]
    return TextTable(
        title=f"Choices of {trace.top_k} of {trace.num_experts} experts by {trace.num_tokens:,} tokens",
        columns=(*columns, "same as token before", "by chance", *(f"balance EP={size}" for size in sizes)),
        rows=tuple(rows),
    )


def _balance_table(of_all: Mapping[int, float]) -> TextTable:
    return TextTable(
        title="Ranks' loads, mean / max",
        columns=("", *(f"EP={size}" for size in of_all)),
        rows=(("all layers, contiguous placement", *(f"{value:.3f}" for value in of_all.values())),),
    )
