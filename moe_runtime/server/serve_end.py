"""Ray Serve's end with the driver that started it, also where that is killed outright.

`ray job stop` kills a driver 3 seconds after it asked it to end; Serve needs up to 20.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator

import ray
from ray import serve
from ray.actor import exit_actor
from ray.exceptions import ActorUnavailableError, RayActorError

# Of its own, since every actor of NAMESPACE in moe_runtime.named is a deployment.
_NAMESPACE = "moe_runtime_serve"
_RETRY_S = 1.0


class _Driver:
    """Lives as long as the driver's job."""

    async def stay(self) -> None:
        await asyncio.Event().wait()


class _ServeEnder:
    """Detached, so that it outlives the driver."""

    async def end_after(self, driver: ray.actor.ActorHandle) -> None:
        """Shut Serve down as soon as `driver` is gone, and go."""
        while True:
            try:
                await driver.stay.remote()
            except ActorUnavailableError:  # its node cannot be reached at the moment
                await asyncio.sleep(_RETRY_S)
            except RayActorError:
                break
        await asyncio.to_thread(serve.shutdown)
        exit_actor()


@contextlib.contextmanager
def serve_ends_with_us() -> Iterator[None]:
    """Shut Ray Serve down at the end of the block, or when this driver ends before that."""
    driver = ray.remote(num_cpus=0)(_Driver).remote()
    ender = (
        ray.remote(num_cpus=0)(_ServeEnder)
        .options(name=f"ender-{secrets.token_hex(4)}", namespace=_NAMESPACE, lifetime="detached")
        .remote()
    )
    ender.end_after.remote(driver)
    try:
        yield
    finally:
        serve.shutdown()
        ray.kill(ender)  # only now: if this process is killed on the way, Serve is still ended
        ray.kill(driver)
