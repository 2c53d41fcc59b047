"""The metrics of a server's deployment, from its engine to the log: the same behind every ingress."""

from __future__ import annotations

import logging
import os

from moe_runtime.async_llm import AsyncLLM
from moe_runtime.metrics.deployment_metrics import DeploymentMetrics
from moe_runtime.server.config import ServerConfig

_LOG_VARIABLE = "MOE_RUNTIME_LOG"


def watch(
    engine: AsyncLLM, config: ServerConfig, *, per_expert: bool, to_ray: bool = False
) -> DeploymentMetrics:
    """Metrics that observe the engine, with a line in the log while requests are in flight; `close` ends that.

    Args:
        per_expert: one series for each expert of each layer.
        to_ray: show them through Ray's own metrics, too.
    """
    metrics = DeploymentMetrics.of(
        engine.deployment, model_name=config.served_model_names[0], per_expert=per_expert
    )
    engine.observe(metrics.observer)
    if _LOG_VARIABLE not in os.environ:  # which says what to log
        logging.getLogger("moe_runtime.metrics").setLevel(logging.INFO)
    metrics.start(to_ray=to_ray)
    return metrics
