"""The metrics behind every ingress: they see the engine's requests, and the environment decides what is logged."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from moe_runtime.metrics.deployment_metrics import DeploymentMetrics
from moe_runtime.server import watching
from tests.server.fake_engine import server_config


class _Engine:
    """What of AsyncLLM is used."""

    deployment: Any = "the deployment"
    observer: Any = None

    def observe(self, observer: Any) -> None:
        self.observer = observer


class _Metrics:
    """Keeps what it was made and started with."""

    observer = object()

    def __init__(self, deployment: Any, **settings: Any) -> None:
        self.made_with = (deployment, settings)
        self.started_with: dict[str, Any] = {}

    def start(self, **settings: Any) -> None:
        self.started_with = settings


@pytest.fixture(autouse=True)
def quiet() -> Iterator[logging.Logger]:
    logger = logging.getLogger("moe_runtime.metrics")
    before = logger.level
    logger.setLevel(logging.WARNING)
    yield logger
    logger.setLevel(before)


@pytest.mark.parametrize(("variable", "level"), [(None, logging.INFO), ("WARNING", logging.WARNING)])
def test_requests_are_observed_and_the_environment_decides_what_is_logged(
    quiet: logging.Logger, monkeypatch: pytest.MonkeyPatch, variable: str | None, level: int
) -> None:
    monkeypatch.setattr(DeploymentMetrics, "of", _Metrics)
    monkeypatch.delenv("MOE_RUNTIME_LOG", raising=False)
    if variable is not None:
        monkeypatch.setenv("MOE_RUNTIME_LOG", variable)
    engine: Any = _Engine()
    metrics: Any = watching.watch(engine, server_config(), per_expert=True, to_ray=True)
    assert engine.observer is metrics.observer
    assert metrics.made_with == ("the deployment", {"model_name": "demo", "per_expert": True})
    assert metrics.started_with == {"to_ray": True}
    assert quiet.level == level
