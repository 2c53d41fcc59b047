"""`bench latency`: how long one batch takes, and how much of that is the wait for first tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from moe_runtime.bench.offline import deployment_facts, greedy, random_batch
from moe_runtime.bench.plots import new_figure, save_figure
from moe_runtime.bench.report import Report, TextTable, load_average
from moe_runtime.bench.serving.metrics import percentile
from moe_runtime.errors import ConfigError
from moe_runtime.request import PromptInput

if TYPE_CHECKING:
    from moe_runtime.llm import LLM

PERCENTILES = (10, 25, 50, 75, 90, 99)  # vLLM's


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyWorkload:
    """What `bench latency` runs; names and defaults as in vLLM, but for fewer iterations."""

    batch_size: int = 8
    input_len: int = 32  # tokens of each prompt
    output_len: int = 128  # tokens generated for each
    num_iters_warmup: int = 3  # before those that count
    num_iters: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "input_len", "output_len", "num_iters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_iters_warmup < 0:
            raise ConfigError(f"num_iters_warmup must be at least 0, got {self.num_iters_warmup}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTimes:
    """One batch, in seconds since it was submitted."""

    latency_s: float  # until its last token
    prefill_s: float  # until every request has its first token
    first_token_s: float  # until a request's first token, mean of the requests
    per_token_s: float | None  # of a request's later tokens, mean of the requests; None where there are none

    @classmethod
    def of(cls, pieces: Sequence[tuple[float, str, int]]) -> BatchTimes:
        """From what arrived: time, request and number of its tokens, in order of time."""
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        num_later: dict[str, int] = {}
        for time_s, request, num_tokens in pieces:
            if not num_tokens:
                continue  # only the reason for the end
            num_later[request] = num_later.get(request, -1) + num_tokens
            first.setdefault(request, time_s)
            last[request] = time_s
        gaps = [(last[r] - first[r]) / count for r, count in num_later.items() if count]
        return cls(
            latency_s=max(last.values()),
            prefill_s=max(first.values()),
            first_token_s=fmean(first.values()),
            per_token_s=fmean(gaps) if gaps else None,
        )


def run_latency(model: str | None, workload: LatencyWorkload, llm_args: Mapping[str, Any]) -> Report:
    """Start a deployment, run batches one after the other, end it.

    Args:
        model: as in LLM.
        llm_args: further arguments of LLM.

    Raises:
        UserError: whatever LLM refuses.
    """
    from moe_runtime.llm import LLM

    started_load = load_average()
    max_model_len = workload.input_len + workload.output_len
    with LLM(model, use_tqdm=False, **{"max_model_len": max_model_len, **llm_args}) as llm:
        rng = random.Random(workload.seed)
        times = [
            _run_batch(llm, workload, rng) for _ in range(workload.num_iters_warmup + workload.num_iters)
        ]
        facts = {**deployment_facts(llm), **asdict(workload)}
        device = llm.ranks[0].device
    result = summarise(times[workload.num_iters_warmup :])
    return Report(
        benchmark="latency",
        device=device,
        started_load=started_load,
        workload=facts,
        results=[result],
        tables=[_table(result, workload)],
    )


def summarise(times: Sequence[BatchTimes]) -> dict[str, Any]:
    """Averages, percentiles and every latency, by vLLM's names where it has them; seconds."""
    latencies = [batch.latency_s for batch in times]
    result: dict[str, Any] = {
        "avg_latency": fmean(latencies),
        "percentiles": _percentiles(latencies),
        "avg_prefill": fmean(batch.prefill_s for batch in times),
        "prefill_percentiles": _percentiles([batch.prefill_s for batch in times]),
        "avg_first_token": fmean(batch.first_token_s for batch in times),
        "latencies": latencies,
    }
    per_token = [batch.per_token_s for batch in times if batch.per_token_s is not None]
    if per_token:
        result["avg_per_token"] = fmean(per_token)
        result["per_token_percentiles"] = _percentiles(per_token)
    return result


def _run_batch(llm: LLM, workload: LatencyWorkload, rng: random.Random) -> BatchTimes:
    """New prompts each time, so that nothing is found in a cache."""
    prompts: list[PromptInput] = [
        *random_batch(rng, workload.batch_size, workload.input_len, llm.info.vocab_size)
    ]
    params = greedy(workload.output_len)
    began = time.perf_counter()
    return BatchTimes.of(
        [
            (time.perf_counter() - began, delta.request_id, len(delta.new_token_ids))
            for delta in llm.stream(prompts, params)
        ]
    )


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {str(percent): percentile(ordered, percent) for percent in PERCENTILES}


def _rows(result: Mapping[str, Any]) -> list[tuple[str, float, Mapping[str, float]]]:
    """What was timed: its name, average and percentiles."""
    rows = [
        ("batch", result["avg_latency"], result["percentiles"]),
        ("prefill: all have their first token", result["avg_prefill"], result["prefill_percentiles"]),
    ]
    if "avg_per_token" in result:
        rows.append(("each later token", result["avg_per_token"], result["per_token_percentiles"]))
    return rows


def _title(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['batch_size']} requests, {facts['input_len']} tokens in, {facts['output_len']} out, "
        f"{facts['num_iters']} batches: milliseconds"
    )


def _table(result: Mapping[str, Any], workload: LatencyWorkload) -> TextTable:
    return TextTable(
        title=_title(asdict(workload)),
        columns=("", "avg", *(f"{percent}%" for percent in PERCENTILES)),
        rows=tuple(
            (name, f"{average * 1e3:,.2f}", *(f"{value * 1e3:,.2f}" for value in values.values()))
            for name, average, values in _rows(result)
        ),
    )


def draw(result: Mapping[str, Any], facts: Mapping[str, Any], prefix: str) -> None:
    """Bars of average and percentiles, a panel for each row of the table, into PREFIX.png and PREFIX.svg.

    Args:
        result: the report's only one, which a saved JSON object holds as well.
        facts: its workload.
    """
    rows = _rows(result)
    figure = new_figure(4.5 * len(rows), 4.0)
    for axes, (name, average, values) in zip(
        figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True
    ):
        names = ["avg", *(f"{percent}%" for percent in values)]
        colours = ["#9d9d9d", *["#4c78a8"] * len(values)]
        axes.bar(names, [1e3 * seconds for seconds in (average, *values.values())], color=colours)
        axes.set(title=name, ylabel="ms")
    figure.suptitle(_title(facts))
    save_figure(figure, prefix)
