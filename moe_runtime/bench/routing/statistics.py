"""Statistics of a routing trace. Pure NumPy.

Shape legend: T tokens, K top-k, E logical experts, M MoE layers, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.experts.trace import RoutingTrace
from moe_runtime.metrics.balance import balancedness, overall_balancedness

_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatistics:
    """How one layer's choices are spread."""

    layer: int  # index in the model
    skew: float  # choices of the busiest expert / mean; 1 is even, num_experts is all on one
    entropy_bits: float  # of a choice; log2(num_experts) is even, 0 is all on one
    experts_for_80_percent: int  # the fewest experts that have 80% of all choices
    # Of a token's experts, the share that the token before it chose too; and what chance alone would give, were each
    # expert as popular as it is.
    overlap: float
    overlap_by_chance: float
    balancedness: Mapping[int, float]  # by ranks: mean / max of their loads over the whole trace


def load_of_experts(trace: RoutingTrace) -> np.ndarray:
    """[M, E]: choices of each expert."""
    return np.stack([np.bincount(c.reshape(-1), minlength=trace.num_experts) for c in trace.choices_TK])


def load_of_ranks(load_ME: np.ndarray, num_ranks: int) -> np.ndarray:
    """[M, W]: choices of the experts of each rank, placed contiguously as a deployment places them."""
    placement = ExpertPlacement.contiguous(load_ME.shape[1], num_ranks)
    return np.stack([load_ME[:, list(experts)].sum(1) for experts in placement.experts_of_rank], axis=1)


def layer_statistics(trace: RoutingTrace, sizes: Sequence[int]) -> list[LayerStatistics]:
    """One entry a layer.

    Args:
        sizes: numbers of ranks, each at most the number of experts.
    """
    load_ME = load_of_experts(trace)
    balance = {size: balancedness(load_of_ranks(load_ME, size)) for size in sizes}
    return [
        LayerStatistics(
            layer=layer,
            skew=float(load_E.max() / load_E.mean()),
            entropy_bits=_entropy_bits(load_E),
            experts_for_80_percent=_num_experts_for(load_E, _SHARE),
            overlap=_overlap(choices_TK, trace.starts),
            overlap_by_chance=float(((load_E / trace.num_tokens) ** 2).sum() / trace.top_k),
            balancedness={size: float(of_layer[index]) for size, of_layer in balance.items()},
        )
        for index, (layer, choices_TK, load_E) in enumerate(
            zip(trace.layers, trace.choices_TK, load_ME, strict=True)
        )
    ]


def overall(trace: RoutingTrace, sizes: Sequence[int]) -> dict[int, float]:
    """By number of ranks: the share of their time in which they would work, all layers together."""
    load_ME = load_of_experts(trace)
    return {size: overall_balancedness(load_of_ranks(load_ME, size)) or 0.0 for size in sizes}


def _entropy_bits(load_E: np.ndarray) -> float:
    share = load_E[load_E > 0] / load_E.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0  # no minus zero


def _num_experts_for(load_E: np.ndarray, share: float) -> int:
    of_best = np.sort(load_E)[::-1].cumsum()
    # Rounded up before it is compared: 0.8 of a whole number of choices is no whole number.
    return int(np.searchsorted(of_best, share * load_E.sum() - 1e-9)) + 1


def _overlap(choices_TK: np.ndarray, starts: np.ndarray) -> float:
    """Mean over tokens that follow another of the same text; NaN where none does."""
    follows = np.ones(len(choices_TK), dtype=bool)
    follows[0] = False
    follows[starts] = False
    after = np.flatnonzero(follows)
    if not len(after):
        return float("nan")
    same = choices_TK[after, :, None] == choices_TK[after - 1, None, :]
    return float(same.any(2).mean())
