"""`moe-runtime serve --ingress serve`: Ray Serve in front of the ranks instead of uvicorn in this process."""

from __future__ import annotations

import signal
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING

from moe_runtime.errors import ConfigError, EngineDeadError, MoeRuntimeError

if TYPE_CHECKING:
    from moe_runtime.frontend import Frontend
    from moe_runtime.server.config import ServerConfig


def check_serve_can(*, host: str, port: int, num_replicas: int) -> None:
    """Raise ConfigError where Ray Serve is not installed or cannot serve so."""
    from moe_runtime.server.listener import listen

    try:
        from ray import serve  # noqa: F401 - whether it is there
    except ImportError as error:
        raise ConfigError(
            f"--ingress serve needs Ray Serve ({error}); pip install 'moe-runtime[serve]'"
        ) from error
    if port == 0:
        raise ConfigError("--port 0 takes a free port, which Ray Serve cannot; name one")
    if num_replicas < 1:
        raise ConfigError(f"--num-replicas must be at least 1, got {num_replicas}")
    listen(host, port).close()


def serve_behind_ray_serve(
    frontend: Frontend,
    config: ServerConfig,
    *,
    host: str,
    port: int,
    num_replicas: int,
    per_expert: bool,
) -> None:
    """Start Ray Serve before a named deployment, print the ready line, and end Ray Serve at SIGINT or SIGTERM.

    Raises:
        ConfigError: Ray Serve runs on this cluster already.
        MoeRuntimeError: what ended the ranks, if they ended by themselves; or Ray Serve could not start.
    """
    from moe_runtime.server import ray_serve
    from moe_runtime.server.listener import url_of

    name = frontend.plan.name
    assert name is not None
    ended: SimpleQueue[MoeRuntimeError | None] = SimpleQueue()

    def stop(number: int, frame: FrameType | None) -> None:
        ended.put(None)

    replicas = ray_serve.serving(
        name, config, host=host, port=port, num_replicas=num_replicas, per_expert=per_expert
    )
    with replicas:
        gone = EngineDeadError("the deployment was stopped; start it anew")
        frontend.deployment.on_end(lambda error: ended.put(error or gone))
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            url = url_of(host, port)
            print(f"moe-runtime: serving {config.served_model_names[0]} at {url}", flush=True)
            if (error := ended.get()) is not None:
                raise error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
