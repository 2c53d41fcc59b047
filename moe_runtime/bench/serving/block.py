"""The block of results that users of vLLM's client know."""

from __future__ import annotations

import math

from moe_runtime.bench.serving.metrics import METRICS, Distribution, ServeMetrics
from moe_runtime.bench.serving.workload import ServeWorkload

_WIDTH = 50


def result_block(metrics: ServeMetrics, workload: ServeWorkload) -> str:
    """`============ Serving Benchmark Result ============` and its lines; latencies in milliseconds."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]
    lines += [_line("Successful requests:", metrics.completed), _line("Failed requests:", metrics.failed)]
    if metrics.first_error is not None:
        lines.append(f"  the first failed with: {metrics.first_error}")
    if workload.max_concurrency is not None:
        lines.append(_line("Maximum request concurrency:", workload.max_concurrency))
    if math.isfinite(workload.request_rate):
        lines.append(_line("Request rate configured (RPS):", workload.request_rate))
    lines += [
        _line("Benchmark duration (s):", metrics.duration_s),
        _line("Total input tokens:", metrics.total_input_tokens),
        _line("Total generated tokens:", metrics.total_output_tokens),
        _line("Request throughput (req/s):", metrics.request_throughput),
    ]
    if metrics.request_goodput is not None:
        lines.append(_line("Request goodput (req/s):", metrics.request_goodput))
    lines += [
        _line("Output token throughput (tok/s):", metrics.output_throughput),
        _line("Peak output token throughput (tok/s):", metrics.max_output_tokens_per_s),
        _line("Peak concurrent requests:", metrics.max_concurrent_requests),
        _line("Total token throughput (tok/s):", metrics.total_token_throughput),
    ]
    for name in workload.percentile_metrics:
        short, long = METRICS[name]
        lines += _latency(short, long, metrics.latencies[name])
    lines += _latency("send delay", "Sent later than planned", metrics.send_delay)
    return "\n".join([*lines, "=" * _WIDTH])


def _latency(short: str, long: str, values: Distribution) -> list[str]:
    lines = [f"{long:-^{_WIDTH}}"]
    lines += [_line(f"Mean {short} (ms):", values.mean), _line(f"Median {short} (ms):", values.median)]
    lines += [_line(f"P{percent:g} {short} (ms):", value) for percent, value in values.percentiles.items()]
    return lines


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<9.2f}".rstrip() if isinstance(value, float) else f"{label:<40} {value}"
