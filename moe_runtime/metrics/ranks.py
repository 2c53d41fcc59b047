"""RankCollector: what the ranks count, as Prometheus metrics; they are asked when somebody scrapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from moe_runtime.metrics.balance import balancedness
from moe_runtime.metrics.history import WindowLoad
from moe_runtime.metrics.names import PREFIX
from moe_runtime.metrics.samples import Sample
from moe_runtime.rank_spec import RankReport, RankStats

_Read = Callable[[RankStats], float]

_GAUGES: tuple[tuple[str, str, _Read], ...] = (
    ("num_requests_running", "Samples that the rank computes.", lambda r: r.scheduler["num_running"]),
    ("num_requests_waiting", "Samples in the rank's queue.", lambda r: r.scheduler["num_waiting"]),
    (
        "kv_cache_usage_perc",
        "Share of the KV blocks that running samples hold, 0 to 1.",
        lambda r: r.scheduler["blocks_used"] / max(1, r.scheduler["blocks_total"]),
    ),
    (
        "state_slot_usage_perc",
        "Share of the DeltaNet state slots that running samples hold, 0 to 1.",
        lambda r: r.scheduler["slots_used"] / max(1, r.scheduler["slots_total"]),
    ),
)
_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    ("prefix_cache_queries", "Prompt tokens looked up.", lambda r: r.scheduler["prefix_query_tokens"]),
    ("prefix_cache_hits", "Prompt tokens found cached.", lambda r: r.scheduler["prefix_hit_tokens"]),
    ("num_preemptions", "Samples sent back to the queue.", lambda r: r.scheduler["preemptions"]),
    ("prompt_tokens", "Prompt tokens computed.", lambda r: r.loop["prompt_tokens"]),
    ("generation_tokens", "Tokens generated.", lambda r: r.loop["generation_tokens"]),
)


class RankCollector(Collector):
    """Yields the families of a deployment's ranks; when they do not answer, only what is known without them."""

    def __init__(
        self,
        latest: Callable[[], Sample | None],
        load: Callable[[], WindowLoad | None],
        *,
        model_name: str,
        deployment_info: Mapping[str, str],
        reports: Sequence[RankReport],
        per_expert: bool,
    ) -> None:
        """
        Args:
            latest: the ranks' counters, or None where they do not answer.
            load: what the experts computed over the last window, after `latest`.
            deployment_info: labels of the family `deployment_info`.
            per_expert: `expert_tokens` has a series for each expert of each layer.
        """
        self._latest = latest
        self._load = load
        self._model_name = model_name
        self._info = dict(deployment_info)
        self._reports = tuple(reports)
        self._per_expert = per_expert

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client's Collector."""
        sample = self._latest()
        ranks = sample.ranks if sample is not None else ()
        yield self._deployment_info()
        yield self._rank_info()
        answering = self._gauge("num_ranks_answering", "Ranks that said what they count, just now.")
        answering.add_metric([self._model_name], len(ranks))
        yield answering
        for name, text, read in _GAUGES:
            yield self._of_ranks(self._gauge(name, text, "rank"), ranks, read)
        for name, text, read in _COUNTERS:
            yield self._of_ranks(self._counter(name, text, "rank"), ranks, read)
        yield self._step_times(ranks)
        yield self._step_sizes(ranks)
        yield self._expert_tokens(ranks)
        yield self._balancedness(ranks)

    # ----------------------------------------------------------------- families

    def _gauge(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(PREFIX + name, text, labels=["model_name", *labels])

    def _counter(self, name: str, text: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(PREFIX + name, text, labels=["model_name", *labels])

    def _of_ranks(
        self, family: GaugeMetricFamily | CounterMetricFamily, ranks: Sequence[RankStats], read: _Read
    ) -> Metric:
        for rank in ranks:
            family.add_metric([self._model_name, str(rank.rank)], read(rank))
        return family

    def _deployment_info(self) -> Metric:
        family = self._gauge("deployment_info", "What is deployed; always 1.", *self._info)
        family.add_metric([self._model_name, *self._info.values()], 1)
        return family

    def _rank_info(self) -> Metric:
        labels = ("rank", "node_ip", "device", "dispatcher")
        family = self._gauge("rank_info", "What each rank is; always 1.", *labels)
        for report in self._reports:
            dispatcher = report.dispatcher.partition(":")[0]  # the rest says why
            values = [self._model_name, str(report.rank), report.node_ip, report.device, dispatcher]
            family.add_metric(values, 1)
        return family

    def _step_times(self, ranks: Sequence[RankStats]) -> Metric:
        text = "Seconds of the rank's steps, by what it was at."
        family = self._counter("step_time_seconds", text, "rank", "part")
        for rank in ranks:
            for part, seconds in rank.step_parts.items():
                family.add_metric([self._model_name, str(rank.rank), part], seconds)
        return family

    def _step_sizes(self, ranks: Sequence[RankStats]) -> Metric:
        text = "Tokens that the rank had in a step, in steps in which it had any."
        family = HistogramMetricFamily(f"{PREFIX}iteration_tokens_total", text, labels=["model_name", "rank"])
        for rank in ranks:
            counts = np.cumsum(rank.step_sizes, dtype=np.int64)
            buckets = [(str(float(1 << i)), float(count)) for i, count in enumerate(counts[:-1])]
            buckets.append(("+Inf", float(counts[-1]) if len(counts) else 0.0))
            family.add_metric([self._model_name, str(rank.rank)], buckets, rank.loop["step_tokens"])
        return family

    def _expert_tokens(self, ranks: Sequence[RankStats]) -> Metric:
        text = "Choices of an expert by a token, by where they were computed."
        labels = ("rank", "layer", "expert") if self._per_expert else ("rank", "layer")
        family = self._counter("expert_tokens", text, *labels)
        for rank in ranks:
            for layer, tokens in zip(rank.moe_layers, rank.expert_tokens, strict=True):
                values = [self._model_name, str(rank.rank), str(layer)]
                if not self._per_expert:
                    family.add_metric(values, sum(tokens))
                    continue
                for expert, count in zip(rank.local_experts, tokens, strict=True):
                    family.add_metric([*values, str(expert)], count)
        return family

    def _balancedness(self, ranks: Sequence[RankStats]) -> Metric:
        text = "Mean / max of the load over the last seconds, over ranks and over experts; 1 is even."
        family = self._gauge("balancedness", text, "layer", "over")
        load = self._load() if ranks else None
        if load is None:
            return family
        for over, values in (("rank", load.ranks_MW), ("expert", load.experts_ME)):
            for layer, value in zip(ranks[0].moe_layers, balancedness(values), strict=True):
                if not np.isnan(value):
                    family.add_metric([self._model_name, str(layer), over], float(value))
        return family
