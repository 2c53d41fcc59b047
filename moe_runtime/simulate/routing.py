"""Routing: which experts tokens choose (uniform, Zipf, or replayed from a trace), and what that makes of ranks.

Shape legend: N tokens of all ranks in a step, K top-k, E logical experts, R ranks, S slots.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moe_runtime.errors import ConfigError
from moe_runtime.simulate.placement import PLACEMENTS, SlotPlacement

_SAMPLED_LAYERS = 4  # of synthetic routing, whose layers differ by chance only
_SAMPLED_TOKENS = 2048  # of a layer, to count the ranks that a token meets


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """What one MoE layer's choices ask of the ranks in one step."""

    rows_R: NDArray[np.float64]  # (token, expert) pairs that each rank computes
    touched_R: NDArray[np.float64]  # slots of each rank with at least one row
    ranks_per_token: float  # distinct ranks that a token's experts are on, its own among them if so
    nodes_per_token: float  # the same of nodes

    @property
    def imbalance(self) -> float:
        """Rows of the fullest rank divided by the mean: 1 is perfect balance."""
        mean = float(self.rows_R.mean())
        return max(1.0, float(self.rows_R.max()) / mean) if mean else 1.0

    def balanced(self) -> LayerLoad:
        """The same choices if every rank had the mean."""
        rows, touched = (np.full_like(x, x.mean()) for x in (self.rows_R, self.touched_R))
        return LayerLoad(rows, touched, self.ranks_per_token, self.nodes_per_token)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the ranks share experts."""

    num_ranks: int
    ranks_per_node: int
    placement: str = "balanced"  # one of PLACEMENTS
    num_redundant: int = 0  # copies beyond one of each expert

    @property
    def num_nodes(self) -> int:
        return -(-self.num_ranks // self.ranks_per_node)

    def place(self, popularity_E: NDArray[np.float64]) -> SlotPlacement:
        """Slots for these experts; with more ranks than experts, enough copies that each rank has one."""
        redundant = max(self.num_redundant, self.num_ranks - len(popularity_E))
        return PLACEMENTS[self.placement](popularity_E, self.num_ranks, redundant)


class Routing(Protocol):
    """Where choices come from."""

    @property
    def name(self) -> str: ...

    def loads(self, layout: Layout, num_tokens: int) -> Sequence[LayerLoad]:
        """One entry for each layer that is looked at; their mean is the model's."""
        ...


@dataclass(frozen=True)
class ZipfRouting:
    """The expert of rank i in popularity is drawn in proportion to (i + 1) ** -skew; 0 is uniform.

    Choices are made without replacement, as the first K arrivals of E exponential clocks. Given the time t of the
    K-th, an expert of weight p is among them with probability 1 - exp(-t p), and t follows from the sum being K.
    The counts of a step are drawn from these probabilities, which is also what placement knows; the ranks that a token
    meets are counted on a sample of tokens.
    """

    num_experts: int
    top_k: int
    skew: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        return f"zipf:{self.skew:g}" if self.skew else "uniform"

    @cached_property
    def expert_rates(self) -> NDArray[np.float64]:
        """t p of every expert, most popular first."""
        weights = np.arange(1, self.num_experts + 1, dtype=np.float64) ** -self.skew
        low, high = 0.0, 1.0
        while _chosen(weights * high).sum() < self.top_k:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if _chosen(weights * middle).sum() < self.top_k else (low, middle)
        return weights * high

    def loads(self, layout: Layout, num_tokens: int) -> Sequence[LayerLoad]:
        return [self._load(layout, num_tokens, layer) for layer in range(_SAMPLED_LAYERS)]

    def _load(self, layout: Layout, num_tokens: int, layer: int) -> LayerLoad:
        placed = _placed_zipf(self, layout, layer)
        rng = np.random.default_rng((self.seed, layer, 1))
        counts_E = rng.binomial(num_tokens, placed.chosen_E).astype(np.float64)
        counts_E *= num_tokens * self.top_k / max(counts_E.sum(), 1)
        return placed.load(counts_E)


@dataclass(frozen=True, eq=False)
class ReplayedRouting:
    """Choices that were recorded, layer by layer.

    A step of N tokens takes N neighbouring tokens of the trace, and all of them in turns; where the trace is
    shorter, its counts are scaled up.
    """

    name: str
    num_experts: int
    choices: tuple[NDArray[np.int64], ...]  # a layer: [tokens, K] logical experts

    @property
    def top_k(self) -> int:
        return self.choices[0].shape[1]

    def loads(self, layout: Layout, num_tokens: int) -> Sequence[LayerLoad]:
        placed_layers = _placed_replay(self, layout)
        return [
            placed.load(counts_E)
            for choices_TK, placed in zip(self.choices, placed_layers, strict=True)
            for counts_E in self._window_counts(choices_TK, num_tokens)
        ]

    def counts(self, choices_TK: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows of each expert, [E]."""
        return np.bincount(choices_TK.ravel(), minlength=self.num_experts).astype(np.float64)

    def _window_counts(self, choices_TK: NDArray[np.int64], num_tokens: int) -> Iterator[NDArray[np.float64]]:
        if len(choices_TK) <= num_tokens:
            yield self.counts(choices_TK) * (num_tokens / len(choices_TK))
            return
        for first in range(0, len(choices_TK) - num_tokens + 1, num_tokens):
            yield self.counts(choices_TK[first : first + num_tokens])


def parse_routing(text: str, num_experts: int, top_k: int) -> Routing:
    """`uniform`, `zipf:SKEW`, or the path of a trace.

    Raises:
        ConfigError: none of them, or the trace is of another model.
    """
    if text == "uniform":
        return ZipfRouting(num_experts, top_k)
    if text.startswith("zipf:"):
        try:
            skew = float(text.removeprefix("zipf:"))
        except ValueError:
            skew = -1.0
        if not 0 <= skew <= 4:
            raise ConfigError(f"--routing {text}: the skew must be a number from 0 to 4, such as zipf:0.8")
        return ZipfRouting(num_experts, top_k, skew)
    from moe_runtime.simulate.trace import read_trace

    trace = read_trace(text)
    if (trace.num_experts, trace.top_k) != (num_experts, top_k):
        raise ConfigError(
            f"the trace {text} chooses {trace.top_k} of {trace.num_experts} experts, the model {top_k} of {num_experts}"
        )
    return trace


def _chosen(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    return -np.expm1(-rates)


@dataclass(frozen=True, slots=True)
class _PlacedLayer:
    """What of a layer's loads does not depend on the tokens of a step."""

    slots: SlotPlacement
    chosen_E: NDArray[np.float64]  # how often a token chooses each expert
    ranks_per_token: float
    nodes_per_token: float

    def load(self, counts_E: NDArray[np.float64]) -> LayerLoad:
        counts_S = (counts_E / self.slots.copies)[self.slots.expert_of_slot]
        return LayerLoad(
            self.slots.per_rank(counts_S),
            self.slots.per_rank(np.minimum(counts_S, 1.0)),
            self.ranks_per_token,
            self.nodes_per_token,
        )


@functools.lru_cache(maxsize=256)
def _placed_zipf(routing: ZipfRouting, layout: Layout, layer: int) -> _PlacedLayer:
    # Popular experts are anywhere, another place in each layer.
    order = np.random.default_rng((routing.seed, layer)).permutation(routing.num_experts)
    chosen_E = np.empty(routing.num_experts)
    chosen_E[order] = _chosen(routing.expert_rates)
    slots = layout.place(chosen_E)
    ranks_TK = _ranks_of_choices(order[_sampled_choices(routing, layer)], slots)
    return _PlacedLayer(slots, chosen_E, _distinct(ranks_TK), _distinct(ranks_TK // layout.ranks_per_node))


@functools.lru_cache(maxsize=_SAMPLED_LAYERS)
def _sampled_choices(routing: ZipfRouting, layer: int) -> NDArray[np.int64]:
    """Choices of some tokens [T, K], 0 the most popular expert: the first arrivals of exponential clocks."""
    rng = np.random.default_rng((routing.seed, layer, 2))
    arrivals_TE = rng.exponential(1 / routing.expert_rates, size=(_SAMPLED_TOKENS, routing.num_experts))
    return np.argpartition(arrivals_TE, routing.top_k - 1, axis=1)[:, : routing.top_k]


@functools.lru_cache(maxsize=32)
def _placed_replay(routing: ReplayedRouting, layout: Layout) -> list[_PlacedLayer]:
    layers = []
    for choices_TK in routing.choices:
        counts_E = routing.counts(choices_TK)
        slots = layout.place(counts_E)
        ranks_TK = _ranks_of_choices(choices_TK, slots)
        nodes_TK = ranks_TK // layout.ranks_per_node
        chosen_E = counts_E / len(choices_TK)
        layers.append(_PlacedLayer(slots, chosen_E, _distinct(ranks_TK), _distinct(nodes_TK)))
    return layers


def _ranks_of_choices(choices_TK: NDArray[np.int64], placed: SlotPlacement) -> NDArray[np.int64]:
    """The rank that computes each choice; tokens take an expert's copies in turn."""
    copies = placed.copies
    order = np.argsort(placed.expert_of_slot, kind="stable")  # slots, those of an expert together
    first = np.cumsum(copies) - copies
    turn_T1 = np.arange(len(choices_TK))[:, None]
    return placed.rank_of_slot[order[first[choices_TK] + turn_T1 % copies[choices_TK]]]


def _distinct(values_TK: NDArray[np.int64]) -> float:
    """Mean number of different values in a row."""
    ordered = np.sort(values_TK, axis=1)
    return 1.0 + float((np.diff(ordered, axis=1) != 0).sum(axis=1).mean())
