"""Dispatch: bytes and seconds of sending tokens to their experts' ranks and getting the results back.

Traffic is counted for one token, averaged over the ranks that it may start on; every rank has as many tokens, so what
a rank sends is also what it receives on average. An exchange takes a fixed time, and then as long as the busier of its
two levels of links.

Shape legend: T tokens of a rank, K top-k, R ranks, N nodes, g ranks of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moe_runtime.errors import ConfigError, did_you_mean
from moe_runtime.simulate.hardware import Hardware
from moe_runtime.simulate.routing import LayerLoad, Layout

_SCALE_BLOCK = 128  # elements of a row in fp8 that share a float32 scale
_WIRE_BYTES: Mapping[str, float] = {"bfloat16": 2.0, "fp8": 1 + 4 / _SCALE_BLOCK}
_COMBINE_BYTES = 2.0  # results are summed: bfloat16


@dataclass(frozen=True, slots=True)
class Copies:
    """Hidden states that one token's exchange puts on each level of links."""

    scale_up: float  # to other ranks of the node
    scale_out: float  # to other nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchPlan:
    """How a deployment exchanges tokens."""

    kind: str  # one of KINDS
    wire_dtype: str = "fp8"  # of dispatch; one of _WIRE_BYTES
    zero_latency: bool = False  # what if: no fixed time, only bytes

    def __post_init__(self) -> None:
        for flag, value, known in (
            ("--dispatch", self.kind, tuple(KINDS)),
            ("--dispatch-dtype", self.wire_dtype, tuple(_WIRE_BYTES)),
        ):
            if value not in known:
                raise ConfigError(
                    f"{flag} must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}"
                )

    @property
    def occupies_device(self) -> bool:
        """Whether the exchange's kernels hold multiprocessors while data is under way."""
        return self.kind != "deepep_low_latency"


@dataclass(frozen=True, slots=True)
class Exchange:
    """Seconds of one layer's exchange on a rank with the mean load, and what the fullest rank takes longer."""

    dispatch: float
    combine: float
    waiting: float


def exchange_seconds(
    hardware: Hardware,
    plan: DispatchPlan,
    layout: Layout,
    load: LayerLoad,
    tokens: float,
    hidden: int,
    top_k: int,
) -> Exchange:
    """Seconds of dispatch and combine of one layer with `tokens` tokens a rank; zeros on one rank."""
    if layout.num_ranks == 1:
        return Exchange(0.0, 0.0, 0.0)
    copies = copies_per_token(plan.kind, layout, load, top_k)
    fixed = 0.0 if plan.zero_latency else fixed_seconds(hardware, plan.kind, layout)
    reached = hardware.efficiency.collective_reached if plan.kind in _NCCL else None
    sent = transfer_seconds(hardware, copies, tokens * hidden * _WIRE_BYTES[plan.wire_dtype], reached)
    returned = transfer_seconds(hardware, copies, tokens * hidden * _COMBINE_BYTES, reached)
    # An all-gather moves everything everywhere, whatever was chosen; otherwise the fullest rank receives most.
    excess = 0.0 if plan.kind == "all_gather" else (sent + returned) * (load.imbalance - 1)
    return Exchange(fixed + sent, fixed + returned, excess)


def transfer_seconds(
    hardware: Hardware, copies: Copies, row_bytes: float, reached: float | None = None
) -> float:
    """Seconds that the links need for `row_bytes` bytes of tokens, so many copies of each."""
    up, out = hardware.scale_up, hardware.scale_out
    return max(
        copies.scale_up * row_bytes / (up.bytes_per_s * (reached or up.reached)),
        copies.scale_out * row_bytes / (out.bytes_per_s * (reached or out.reached)),
    )


def copies_per_token(kind: str, layout: Layout, load: LayerLoad, top_k: int) -> Copies:
    """Copies of one token, averaged over all ranks that it may start on."""
    return KINDS[kind](layout, load, top_k)


def fixed_seconds(hardware: Hardware, kind: str, layout: Layout) -> float:
    """Seconds of one exchange without its bytes."""
    e, ranks, nodes = hardware.efficiency, layout.num_ranks, layout.num_nodes
    if kind == "all_gather":
        return e.collective_s + (nodes - 1) * e.hop_s  # a ring passes every node
    if kind == "all_to_all":
        # Messages to the g ranks of a node leave through g network cards at once.
        return e.collective_s + (nodes - 1) * e.hop_s
    return e.exchange_s + (ranks - 1) * e.peer_s


def _per_expert(layout: Layout, load: LayerLoad, top_k: int) -> Copies:
    """DeepEP's low-latency kernels: a copy for every expert, straight to its rank."""
    elsewhere, outside = _shares(layout)
    return Copies(top_k * (elsewhere - outside), top_k * outside)


def _per_rank(layout: Layout, load: LayerLoad, top_k: int) -> Copies:
    """Once to each rank however many of the token's experts are there; results come back as one sum a rank."""
    elsewhere, outside = _shares(layout)
    return Copies(load.ranks_per_token * (elsewhere - outside), load.ranks_per_token * outside)


def _per_node(layout: Layout, load: LayerLoad, top_k: int) -> Copies:
    """DeepEP's normal kernels: once to each node, forwarded there over NVLink, but for the rank that it arrives at."""
    _, outside = _shares(layout)
    per_node = min(layout.ranks_per_node, layout.num_ranks)
    return Copies(load.ranks_per_token * (1 - 1 / per_node), load.nodes_per_token * outside)


def _everywhere(layout: Layout, load: LayerLoad, top_k: int) -> Copies:
    """All-gather and reduce-scatter: every rank gets every token; g network cards share what enters a node."""
    per_node = min(layout.ranks_per_node, layout.num_ranks)
    return Copies(layout.num_ranks - 1, (layout.num_ranks - per_node) / per_node)


def _shares(layout: Layout) -> tuple[float, float]:
    """Probability that a given rank is not the token's own, and that it is on another node."""
    return 1 - 1 / layout.num_ranks, 1 - 1 / layout.num_nodes


_NCCL = ("all_gather", "all_to_all")
KINDS: Mapping[str, Callable[[Layout, LayerLoad, int], Copies]] = {
    "deepep_low_latency": _per_expert,
    "deepep_normal": _per_node,
    "all_to_all": _per_rank,
    "all_gather": _everywhere,
    "shared_memory": _per_rank,
}
