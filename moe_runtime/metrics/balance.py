"""How evenly work is spread over ranks and over experts.

Shape legend: M MoE layers, E logical experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_runtime.rank_spec import RankStats


def balancedness(load_MN: np.ndarray) -> np.ndarray:
    """[M]: mean / max of each layer's load over its N bearers; NaN for a layer without load.

    1 is an even spread, 1/N is all on one. As in EPLB and SGLang: the bearers of a layer work at once and the
    slowest is waited for, so this is the share of their time in which they work.
    """
    mean_M, max_M = _means(load_MN), load_MN.max(1, initial=0)
    return np.divide(mean_M, max_M, out=np.full(len(load_MN), np.nan), where=max_M > 0)


def overall_balancedness(load_MN: np.ndarray) -> float | None:
    """One number for all layers, which run one after another: sum of means / sum of maxima; None without load."""
    longest = float(load_MN.max(1, initial=0).sum())
    return float(_means(load_MN).sum()) / longest if longest else None


def tokens_per_expert(ranks: Sequence[RankStats]) -> np.ndarray:
    """[M, E]: choices of each logical expert, counted up, over all ranks that hold it."""
    num_experts = 1 + max((max(rank.local_experts, default=-1) for rank in ranks), default=-1)
    num_layers = len(ranks[0].moe_layers) if ranks else 0
    tokens_ME = np.zeros((num_layers, num_experts), dtype=np.int64)
    for rank in ranks:
        if rank.local_experts and num_layers:
            tokens_ME[:, list(rank.local_experts)] += np.asarray(rank.expert_tokens, dtype=np.int64)
    return tokens_ME


def tokens_per_rank(ranks: Sequence[RankStats]) -> np.ndarray:
    """[M, W]: choices of experts of each rank, counted up."""
    return np.array([[sum(layer) for layer in rank.expert_tokens] for rank in ranks], dtype=np.int64).T


def _means(load_MN: np.ndarray) -> np.ndarray:
    return load_MN.sum(1) / max(1, load_MN.shape[1])
