"""What runs on a cluster: its deployments, and the ranks of a named one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group_table

from moe_runtime.cluster import GroupName
from moe_runtime.errors import MoeRuntimeError
from moe_runtime.named import NamedDeployment, OwnerStatus, deployment_names, find_owner
from moe_runtime.rank_spec import RankReport, RankStats

_OWNER_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentSummary:
    """One deployment of a cluster."""

    name: str | None  # None: it has none, and ends with its driver
    model: str | None  # None: its owner does not answer
    num_ranks: int | None  # the same
    nodes: tuple[str, ...]  # addresses of those that hold its ranks; empty while it waits for resources
    state: (
        str  # starting, running, ended, silent; without a name, what its placement group is: placed, waiting
    )
    reason: str | None  # what ended it


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentStatus:
    """A named deployment and its ranks."""

    summary: DeploymentSummary
    reports: tuple[RankReport, ...]  # none unless it runs
    stats: tuple[RankStats, ...]  # none if a rank does not answer
    problem: str | None  # why it cannot serve now

    @property
    def serves(self) -> bool:
        """Whether it runs and every rank has answered."""
        return self.problem is None


def list_deployments() -> list[DeploymentSummary]:
    """All deployments of this cluster, named ones first."""
    groups = _groups()
    named = [_summarize(name, groups) for name in deployment_names()]
    unnamed = [
        DeploymentSummary(
            name=None,
            model=label.model,
            num_ranks=len(group["bundles"]),
            nodes=_nodes(group),
            state="placed" if group["state"] == "CREATED" else "waiting",
            reason=None,
        )
        for label, group in groups
        if label.deployment is None
    ]
    return named + unnamed


def deployment_status(name: str) -> DeploymentStatus:
    """A named deployment with what its ranks say.

    Raises:
        ConfigError: there is none of that name.
    """
    find_owner(name)
    summary = _summarize(name, _groups())
    if summary.state != "running":
        problem = f"it is {summary.state}" + (f": {summary.reason}" if summary.reason else "")
        return DeploymentStatus(summary=summary, reports=(), stats=(), problem=problem)
    reports: Sequence[RankReport] = ()
    try:
        deployment = NamedDeployment.attach(name)
        reports = deployment.connection.reports
        stats = deployment.stats()
    except MoeRuntimeError as error:
        return DeploymentStatus(summary=summary, reports=tuple(reports), stats=(), problem=str(error))
    return DeploymentStatus(summary=summary, reports=tuple(reports), stats=tuple(stats), problem=None)


def _groups() -> list[tuple[GroupName, dict[str, Any]]]:
    """Placement groups of deployments, with what their names say."""
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return [(label, group) for group in groups if (label := GroupName.decode(group["name"]))]


def _summarize(name: str, groups: Sequence[tuple[GroupName, dict[str, Any]]]) -> DeploymentSummary:
    owner = _ask_owner(name)
    nodes = [_nodes(group) for label, group in groups if label.deployment == name]
    return DeploymentSummary(
        name=name,
        model=owner.model if owner else None,
        num_ranks=owner.num_ranks if owner else None,
        nodes=nodes[0] if nodes else (),
        state=owner.state if owner else "silent",
        reason=owner.reason if owner else None,
    )


def _ask_owner(name: str) -> OwnerStatus | None:
    """None if it does not answer, or ends meanwhile."""
    try:
        return ray.get(find_owner(name).status.remote(), timeout=_OWNER_TIMEOUT_S)
    except (RayError, GetTimeoutError, MoeRuntimeError):
        return None


def _nodes(group: dict[str, Any]) -> tuple[str, ...]:
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    holders = {node for node in group["bundles_to_node_id"].values() if node}
    return tuple(sorted(addresses.get(node, node) for node in holders))
