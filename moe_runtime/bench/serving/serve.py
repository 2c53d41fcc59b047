"""`bench serve` from a URL to a report: probe the server, warm it up, send the load, compute the metrics."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from moe_runtime.bench.report import Report, load_average
from moe_runtime.bench.serving.answer import RequestRecord
from moe_runtime.bench.serving.arrivals import arrival_times
from moe_runtime.bench.serving.block import result_block
from moe_runtime.bench.serving.http_stream import HttpPool, Target
from moe_runtime.bench.serving.load import Load
from moe_runtime.bench.serving.metrics import ServeMetrics, compute_metrics
from moe_runtime.bench.serving.prompts import Conversation, RandomLengths
from moe_runtime.bench.serving.workload import ServeWorkload
from moe_runtime.errors import ServerError
from moe_runtime.openai_client import OpenAIClient

# Requests that leave later than this are no longer the load that was asked for.
_LATE_MS = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRun:
    """What a run gave: its report, and what figures are drawn from."""

    report: Report
    metrics: ServeMetrics
    records: Sequence[RequestRecord]
    warnings: Sequence[str]


def run_serve(base_url: str, model: str | None, api_key: str | None, workload: ServeWorkload) -> ServeRun:
    """Measure a server.

    Args:
        base_url: with or without the API's `/v1` at its end.
        model: None takes the first that the server has.

    Raises:
        ConfigError: the URL or the data set cannot be used.
        ServerError: the server cannot be reached, or refuses the first request.
    """
    started_load = load_average()
    base_url = base_url.rstrip("/").removesuffix("/v1")
    target = Target.parse(base_url + workload.endpoint)
    # What cannot be made is refused before the server is asked for anything.
    planned = workload.conversations(as_ids=workload.wants_token_ids)
    starts_s = arrival_times(len(planned), workload.request_rate, workload.burstiness, workload.seed)
    with OpenAIClient(f"{base_url}/v1", api_key) as client:
        model = model or client.models()[0]
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    measured = asyncio.run(_measure(HttpPool(target, headers), model, workload, planned, starts_s))
    metrics = compute_metrics(
        measured.records,
        measured.duration_s,
        percentiles=workload.metric_percentiles,
        goodput_ms=workload.goodput,
    )
    warnings = _warnings(metrics, workload)
    facts = _facts(base_url, model, workload, as_ids=measured.as_ids)
    report = Report(
        benchmark="serve",
        device=f"the server at {base_url}",
        started_load=started_load,
        workload=facts,
        results=[{**metrics.to_dict(), "warnings": warnings}],
        tables=[],
        texts=[result_block(metrics, workload)],
    )
    return ServeRun(report=report, metrics=metrics, records=measured.records, warnings=warnings)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    records: Sequence[RequestRecord]
    duration_s: float
    as_ids: bool  # whether random prompts were token ids


async def _measure(
    pool: HttpPool,
    model: str,
    workload: ServeWorkload,
    planned: list[Conversation],
    starts_s: Sequence[float],
) -> _Measured:
    try:
        as_ids = await _probe(pool, model, workload)
        if as_ids != workload.wants_token_ids:
            planned = workload.conversations(as_ids=as_ids)
        await _warm_up(pool, model, workload, as_ids=as_ids)
        total = sum(len(conversation.turns) for conversation in planned)
        with tqdm(total=total, unit="request", disable=not sys.stderr.isatty()) as bar:
            records, duration_s = await Load(pool, model, workload).run(
                planned, starts_s, lambda record: bar.update() and None
            )
    finally:
        pool.close()
    return _Measured(records=records, duration_s=duration_s, as_ids=as_ids)


async def _probe(pool: HttpPool, model: str, workload: ServeWorkload) -> bool:
    """Send one small request, as token ids if that is what is wanted; returns whether the server takes ids.

    Raises:
        ServerError: it takes neither ids nor words.
    """
    small = RandomLengths(input_len=8, output_len=1)
    kinds = (True, False) if workload.wants_token_ids else (False,)
    error = None
    for as_ids in kinds:
        prompts = dataclasses.replace(workload, dataset_name="random", dataset_path=None, lengths=small)
        prompts = dataclasses.replace(prompts, num_warmups=1)
        records, _ = await Load(pool, model, workload).run(prompts.warmups(as_ids=as_ids), [0.0])
        error = error or records[0].error
        if records[0].error is None:
            return as_ids
    raise ServerError(f"the server refuses the first request: {error}")


async def _warm_up(pool: HttpPool, model: str, workload: ServeWorkload, *, as_ids: bool) -> None:
    """Requests that do not count, as many at once as there will be later."""
    conversations = workload.warmups(as_ids=as_ids)
    records, _ = await Load(pool, model, workload).run(conversations, [0.0] * len(conversations))
    if error := next((record.error for record in records if record.error is not None), None):
        raise ServerError(f"a warm-up request failed: {error}")


def _warnings(metrics: ServeMetrics, workload: ServeWorkload) -> list[str]:
    found = []
    late_ms = max(metrics.send_delay.percentiles.values(), default=metrics.send_delay.mean)
    if math.isfinite(workload.request_rate) and late_ms > _LATE_MS:
        found.append(
            f"the client did not keep up: requests left {metrics.send_delay.median:.0f} ms (median) and up to "
            f"{late_ms:.0f} ms after their time; lower --request-rate, or give the client a core of its own"
        )
    if metrics.uncounted:
        found.append(
            f"the server sent no usage with {metrics.uncounted} of {metrics.completed} answers: their output "
            "tokens are the chunks that arrived, which may hold more than one token each"
        )
    return found


def _facts(base_url: str, model: str, workload: ServeWorkload, *, as_ids: bool) -> dict[str, Any]:
    """The workload as JSON can hold it; numbers of data sets that were not used stay out."""
    given = asdict(workload)
    lengths = given.pop("lengths")
    kept = {name: value for name, value in given.items() if value not in (None, {}, ())}
    for name in ("shared_prefix", "multi_turn"):
        if workload.dataset_name != name.replace("_", "-"):
            kept = {key: value for key, value in kept.items() if not key.startswith(name)}
    if workload.dataset_name != "file":
        kept |= {f"random_{name}": value for name, value in lengths.items()}
        kept["prompts_as"] = "token ids" if as_ids else "words"
    kept["request_rate"] = "inf" if math.isinf(workload.request_rate) else workload.request_rate
    return {"base_url": base_url, "model": model, **kept}
