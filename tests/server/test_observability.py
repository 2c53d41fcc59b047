"""/metrics and /v1/load: there once the deployment is, under the keys that they should need."""

from __future__ import annotations

from collections.abc import Callable

from moe_runtime.metrics.deployment_metrics import DeploymentMetrics
from tests.server.conftest import Served


def test_both_wait_for_the_deployment_and_then_show_it(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served(api_keys=("secret",))
        async with served.client() as client:
            assert (await client.get("/metrics")).status_code == 503
            served.state.attach(served.engine, DeploymentMetrics(list, model_name="demo"))
            metrics = await client.get("/metrics")
            assert metrics.status_code == 200
            assert metrics.headers["content-type"].startswith("text/plain")
            assert 'moe_runtime:num_ranks_answering{model_name="demo"}' in metrics.text
            assert (await client.get("/v1/load")).status_code == 401
            load = await client.get("/v1/load", headers={"authorization": "Bearer secret"})
            assert load.status_code == 200
            assert "ranks_answer" in load.json()

    run(scenario())
