"""Log-probabilities of chosen and of best tokens, from the model's own logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

RankedLogprobs = dict[int, tuple[float, int]]  # token id -> (natural log of its probability, rank from 1)

_ELEMENTS_AT_ONCE = 1 << 24  # 64 MB of float32; the prompt logits of a long chunk are many times that


def ranked_logprobs(
    logits_NV: torch.Tensor, chosen_N: torch.Tensor, num_best: Sequence[int]
) -> list[RankedLogprobs]:
    """For each row the chosen token, first, and the `num_best` best tokens (-1: all), best first.

    Log-softmax in float32 of logits of any float dtype, before any sampling parameter. A rank is 1 plus the
    number of tokens with a higher logit, so that tokens that tie share a rank.
    """
    rows_at_once = max(1, _ELEMENTS_AT_ONCE // logits_NV.shape[1])
    found: list[RankedLogprobs] = []
    for start in range(0, logits_NV.shape[0], rows_at_once):
        part = slice(start, start + rows_at_once)
        found += _ranked_logprobs(logits_NV[part], chosen_N[part], num_best[part])
    return found


def _ranked_logprobs(
    logits_NV: torch.Tensor, chosen_N: torch.Tensor, num_best: Sequence[int]
) -> list[RankedLogprobs]:
    vocab = logits_NV.shape[1]
    logprobs_NV = logits_NV.float().log_softmax(-1)
    chosen_N1 = chosen_N[:, None]
    chosen_logprob_N1 = logprobs_NV.gather(1, chosen_N1)
    # Logits decide ranks: two that differ may have logprobs that round to one value.
    chosen_rank_N = (logits_NV > logits_NV.gather(1, chosen_N1)).sum(-1) + 1
    sizes = [vocab if k < 0 else min(k, vocab) for k in num_best]
    best_NK = logits_NV.topk(max(sizes), dim=-1)
    columns = (
        chosen_N.tolist(),
        chosen_logprob_N1[:, 0].tolist(),
        chosen_rank_N.tolist(),
        sizes,
        best_NK.indices.tolist(),
        logprobs_NV.gather(1, best_NK.indices).tolist(),
        best_NK.values.tolist(),
    )
    return [
        {token: (logprob, rank)} | _ranked(ids[:size], logprobs, logits)
        for token, logprob, rank, size, ids, logprobs, logits in zip(*columns, strict=True)
    ]


def _ranked(ids: list[int], logprobs: list[float], logits: list[float]) -> RankedLogprobs:
    ranked: RankedLogprobs = {}
    rank = 0
    for index, token in enumerate(ids):
        if index == 0 or logits[index] < logits[index - 1]:
            rank = index + 1
        ranked[token] = (logprobs[index], rank)
    return ranked


def prompt_logprobs(logits_PV: torch.Tensor, next_ids: Sequence[int], k: int) -> list[RankedLogprobs]:
    """Log-probabilities of prompt tokens: row p of the logits predicts `next_ids[p]`, the token at p + 1.

    One dict a row: the actual token, first, and the `k` best (-1: all), with ranks as in `ranked_logprobs`.
    The first token of a prompt has no row; a prompt computed in chunks may be reported chunk by chunk.
    """
    assert logits_PV.shape[0] == len(next_ids), f"{logits_PV.shape[0]} rows of logits, {len(next_ids)} tokens"
    if not next_ids:
        return []
    actual_P = torch.tensor(list(next_ids), device=logits_PV.device)
    return ranked_logprobs(logits_PV, actual_P, [k] * len(next_ids))
