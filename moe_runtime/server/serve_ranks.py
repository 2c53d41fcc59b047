"""The ranks of a Ray Serve application: they outlive the replicas that come and go, and end with the application."""

from __future__ import annotations

import logging
import time

import ray
from ray import serve

from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.frontend import Frontend
from moe_runtime.modelfiles import resolve_model
from moe_runtime.named import (
    NamedDeployment,
    deployment_names,
    deployment_plan,
    find_owner,
    stop_deployment,
)
from moe_runtime.registry import resolve_target
from moe_runtime.server.launch import ServeSettings

logger = logging.getLogger(__name__)

# For requests at work when the application is deleted; Serve's own grace for a replica is longer.
DRAIN_S = 10.0
_POLL_S = 0.2


def take_ranks(settings: ServeSettings, application: str) -> Frontend:
    """Attach to what an earlier replica of the application has started, if it serves and is what `settings` say.

    Otherwise that is ended, and started anew.

    Raises:
        ConfigError: somebody else has a deployment of the name; and what `Frontend.start` raises.
    """
    keeper = _keeper(application)
    others = [name for name in deployment_names() if not _is_kept_by(name, keeper)]
    if settings.name in others:
        raise ConfigError(
            f"a deployment named {settings.name!r} runs already and is not of the application {application!r}; "
            f"give connect={settings.name} to serve it, or choose another name"
        )
    for name in deployment_names():
        if name in others:
            continue
        if name == settings.name and _serves(settings):
            return Frontend.attach(name)
        logger.warning("ending the ranks of %r, which have failed or are to change", name)
        stop_deployment(name)
    return settings.start(keeper)


def end_ranks(name: str, application: str) -> None:
    """End the application's ranks after what is at work, if it is being deleted; else its next replica has them."""
    if not _is_going(application) or not _is_kept_by(name, _keeper(application)):
        return
    try:
        deployment = NamedDeployment.attach(name)
        deadline = time.monotonic() + DRAIN_S
        while time.monotonic() < deadline and _num_at_work(deployment):
            time.sleep(_POLL_S)
    except MoeRuntimeError as error:
        logger.warning("the ranks of %r had failed: %s", name, error)
    stop_deployment(name)


def _keeper(application: str) -> str:
    return f"Ray Serve: {application}"


def _is_kept_by(name: str, keeper: str) -> bool:
    try:
        plan = deployment_plan(name)
    except ConfigError:  # it has ended meanwhile
        return False
    return plan is not None and plan.keeper == keeper


def _serves(settings: ServeSettings) -> bool:
    """Whether the running deployment is what `settings` say, and every rank of it answers."""
    plan = deployment_plan(settings.name)
    files = resolve_model(settings.model, revision=settings.revision)
    target = resolve_target(files.config, settings.model_class)
    if plan is None or (plan.config, plan.files.path, plan.target) != (settings.engine, files.path, target):
        return False
    try:
        if ray.get(find_owner(settings.name).status.remote(), timeout=10).state != "running":
            return False
        NamedDeployment.attach(settings.name).check_health()
    except (MoeRuntimeError, ray.exceptions.RayError):
        return False
    return True


def _num_at_work(deployment: NamedDeployment) -> int:
    return sum(
        of_rank.scheduler["num_running"] + of_rank.scheduler["num_waiting"] for of_rank in deployment.stats()
    )


def _is_going(application: str) -> bool:
    """Whether Serve deletes the application, or has gone itself."""
    try:
        status = serve.status().applications.get(application)
    except Exception:  # of many kinds: the controller has ended, or ends now
        return True
    return status is None or status.status == "DELETING"
