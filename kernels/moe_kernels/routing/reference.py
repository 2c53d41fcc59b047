"""Softmax and top-k in plain torch: the specification of `route`."""

from __future__ import annotations

import torch

from moe_kernels.numerics import accumulation_dtype


def route(logits_TE: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See `moe_kernels.routing.route`."""
    probs_TE = torch.softmax(logits_TE, dim=-1, dtype=accumulation_dtype(logits_TE.dtype))
    weights_TK, ids_TK = probs_TE.topk(top_k, dim=-1)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return ids_TK, weights_TK.to(logits_TE.dtype)
