"""Runs an inspection as a CPU-only Ray task in the workers' runtime environment, and raises what it found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_runtime import errors
from moe_runtime.inspection.task import run_inspection

_GRACE_S = 30.0  # for Ray to start a worker, runtime environment included, beyond the inspection's own limit


def inspect_remotely(
    request: Mapping[str, Any], timeout_s: float, runtime_env: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The successful reply of `run_inspection`, run on the cluster; starts Ray where there is none.

    Raises the InspectionError or UserError that the reply names.
    """
    import ray

    from moe_runtime.connecting import ensure_ray

    owns_ray = ensure_ray()
    try:
        reply = _run_task(request, timeout_s, runtime_env)
    finally:
        if owns_ray:
            ray.shutdown()
    if reply["ok"]:
        return reply
    text = "\n".join(part for part in (reply["message"], reply["traceback"]) if part)
    raise getattr(errors, reply["error"])(text)


def _run_task(
    request: Mapping[str, Any], timeout_s: float, runtime_env: Mapping[str, Any] | None
) -> dict[str, Any]:
    import ray

    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0, "max_retries": 0}
    if runtime_env is not None:
        options["runtime_env"] = dict(runtime_env)
    reference = ray.remote(run_inspection).options(**options).remote(dict(request), timeout_s)
    try:
        reply: dict[str, Any] = ray.get(reference, timeout=timeout_s + _GRACE_S)
        return reply
    except ray.exceptions.GetTimeoutError:
        ray.cancel(reference, force=True)
        raise errors.InspectionTimeoutError(
            f"the cluster did not run the inspection task within {timeout_s + _GRACE_S:g} s; see `ray status` for "
            f"whether it can start workers"
        ) from None
    except ray.exceptions.WorkerCrashedError as error:
        raise errors.InspectionCrashError(f"the Ray worker of the inspection task died: {error}") from error
    except ray.exceptions.RayError as error:
        raise errors.InspectionError(
            f"the inspection task could not run on the cluster (is moe_runtime importable on the workers?): {error}"
        ) from error
    except BaseException:  # Ctrl-C: the task is killed, and the inspecting process dies with it
        # Only a task that still runs: cancelling one whose result has come aborts this process now and then
        # (`Check failed: Tried to complete task that was not pending`).
        ray.cancel(reference, force=True)
        raise
