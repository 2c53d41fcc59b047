"""Ray Serve as ingress: the same application in replicas that reserve nothing, in front of one set of ranks.

`build` is the import path for `serve run`, `serve deploy` and a RayService manifest:
`moe_runtime.server.ray_serve:build`. Needs the extra "serve".
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve

from moe_runtime.async_llm import AsyncLLM
from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.server.app import make_app
from moe_runtime.server.config import ServerConfig
from moe_runtime.server.launch import ServeSettings, settings_from_mapping
from moe_runtime.server.page_routes import page_router
from moe_runtime.server.serve_end import serve_ends_with_us
from moe_runtime.server.serve_ranks import DRAIN_S, end_ranks, take_ranks
from moe_runtime.server.watching import watch

# Serve's own limit would queue what the application answers with 429.
_NO_LIMIT = 1_000_000
_HEALTH_TIMEOUT_S = 30


@serve.deployment(
    name="Model",
    num_replicas=1,
    ray_actor_options={"num_cpus": 0},
    health_check_timeout_s=_HEALTH_TIMEOUT_S,
    graceful_shutdown_timeout_s=DRAIN_S + 20,
)
class Model:
    """Holds the ranks: starts them or takes them over from the replica before it."""

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc] # Serve awaits it
        self._name = settings.name
        self._application = serve.get_replica_context().app_name
        self._llm = AsyncLLM(await asyncio.to_thread(take_ranks, settings, self._application))

    async def name(self) -> str:
        """Of the deployment, which serves."""
        return self._name

    async def check_health(self) -> None:
        """Serve's: every rank answers."""
        await self._llm.check_health()

    async def __del__(self) -> None:
        """Serve calls it when it ends the replica; the ranks end only with the application."""
        await asyncio.to_thread(end_ranks, self._name, self._application)


@serve.deployment(
    name="Http",
    ray_actor_options={"num_cpus": 0},
    max_ongoing_requests=_NO_LIMIT,
    health_check_timeout_s=_HEALTH_TIMEOUT_S,
)
@serve.ingress()
class Http:
    """A replica of the application, attached to the ranks as one driver among others."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, config: ServerConfig, per_expert: bool, model: Any
    ) -> None:
        name = model if isinstance(model, str) else await model.name.remote()
        self._llm = await AsyncLLM.connect(name)
        self._metrics = watch(self._llm, config, per_expert=per_expert)
        self._app = make_app(self._llm, config, extra_routers=[page_router()])
        self._app.state.server.attach(self._llm, self._metrics)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's: the application, once this replica is made."""
        return self._app

    async def check_health(self) -> None:
        """Serve's: every rank answers."""
        await self._llm.check_health()

    async def __del__(self) -> None:
        """Serve calls it when it ends the replica; the ranks go on."""
        self._metrics.close()
        await self._llm.shutdown()


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application.

    Args:
        args: the flags of `moe-runtime serve`, by their Python names. `name` is that of the deployment of ranks
            ("serve" by default), which belongs to the application; `connect` names one that does not.
            `num_replicas` are the HTTP replicas.

    Raises:
        ConfigError: an argument is unknown or cannot be used.
    """
    settings = settings_from_mapping(args)
    # Serve's decorators put deployments in the place of the classes.
    model = settings.connect or Model.bind(settings)  # type: ignore[attr-defined]
    return _bind_http(model, settings.server, settings.per_expert_metrics, settings.num_replicas)


def _bind_http(model: Any, config: ServerConfig, per_expert: bool, num_replicas: int) -> serve.Application:
    http = Http.options(num_replicas=num_replicas)  # type: ignore[attr-defined]
    return http.bind(config, per_expert, model)


@contextlib.contextmanager
def serving(
    name: str, config: ServerConfig, *, host: str, port: int, num_replicas: int, per_expert: bool
) -> Iterator[None]:
    """Ray Serve, started for this block alone, in front of the running deployment named `name`.

    Raises:
        ConfigError: Ray Serve runs on this cluster already.
        MoeRuntimeError: it could not start the application.
    """
    # It would keep its address, and its end would end other applications.
    if (running := serve.status()).proxies or running.applications:
        raise ConfigError(
            "Ray Serve runs on this cluster already; add an application to it with "
            f"`serve run --name NAME --route-prefix /NAME moe_runtime.server.ray_serve:build connect={name}`"
        )
    with serve_ends_with_us():
        serve.start(http_options={"host": host, "port": port}, proxy_location="HeadOnly")
        application = _bind_http(name, config, per_expert, num_replicas)
        try:
            serve.run(application, name="moe_runtime", route_prefix="/")
        except RuntimeError as error:
            raise MoeRuntimeError(f"Ray Serve could not start the server: {error}") from error
        yield
