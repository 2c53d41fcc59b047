"""Choosing each token's experts from the router's logits.

Shape legend: T tokens, E logical experts, K top-k.
"""

from __future__ import annotations

import torch

from moe_kernels.implementations import find_implementation

_TABLE = {
    "reference": "moe_kernels.routing.reference:route",
    "cpu": "moe_kernels.routing.cpu:route",
    "triton": "moe_kernels.routing.triton:route",
}


def route(
    logits_TE: torch.Tensor, top_k: int, renormalize: bool, *, implementation: str = "reference"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(topk_ids_TK int64, topk_weights_TK in the logits' dtype), most probable expert first.

    Weights are the softmax over all experts, in float32 (float64 for float64), of the chosen ones; with
    `renormalize` they are divided by their sum.
    """
    return find_implementation("routing", _TABLE, implementation)(logits_TE, top_k, renormalize)
