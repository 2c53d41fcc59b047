"""Mending: what one ideal change at a time would gain, everything else as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from moe_runtime.simulate.deployment import Deployment
from moe_runtime.simulate.dispatch import KINDS
from moe_runtime.simulate.search import Operation


def _double_network(d: Deployment) -> Deployment:
    out = d.hardware.scale_out
    return replace(d, hardware=replace(d.hardware, scale_out=replace(out, bytes_per_s=2 * out.bytes_per_s)))


def _zero_latency(d: Deployment) -> Deployment:
    return replace(d, dispatch=replace(d.dispatch, zero_latency=True))


def _one_more_copy(d: Deployment) -> Deployment:
    """One more expert on each rank, a copy of a hot one."""
    layout = d.layout
    base = max(layout.num_redundant, layout.num_ranks - d.model.num_experts, 0)
    more = base + layout.num_ranks
    return replace(d, layout=replace(layout, placement="balanced", num_redundant=more))


def _other_dispatch(kind: str) -> Callable[[Deployment], Deployment]:
    return lambda d: replace(d, dispatch=replace(d.dispatch, kind=kind))


MENDINGS: Mapping[str, Callable[[Deployment], Deployment]] = {
    "double network bandwidth": _double_network,
    "zero network latency": _zero_latency,
    "perfect balance": lambda d: replace(d, perfect_balance=True),
    "one redundant expert a rank": _one_more_copy,
    "overlap": lambda d: replace(d, overlap=True),
    "fp8 dispatch": lambda d: replace(d, dispatch=replace(d.dispatch, wire_dtype="fp8")),
    **{f"dispatch: {kind}": _other_dispatch(kind) for kind in KINDS if kind != "shared_memory"},
}


@dataclass(frozen=True, slots=True)
class Mending:
    """One change and what it gives."""

    name: str
    gain: float  # tokens/s a GPU with it, divided by those without; 1: nothing


def mend(
    deployment: Deployment, operate: Callable[[Deployment], Operation], before: Operation
) -> list[Mending]:
    """Every change that is one, best first; empty where nothing ran before.

    Args:
        operate: runs a deployment; the batch is sought anew, so that a change may also make room for more.
    """
    if before.time is None:
        return []
    changed = {name: change(deployment) for name, change in MENDINGS.items()}
    mendings = [
        Mending(name, operate(d).tokens_per_s / before.tokens_per_s)
        for name, d in changed.items()
        if d != deployment
    ]
    return sorted(mendings, key=lambda m: -m.gain)
