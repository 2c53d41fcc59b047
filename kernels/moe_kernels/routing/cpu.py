"""Softmax and top-k in native code."""

from __future__ import annotations

import torch

from moe_kernels.native.library import native_function
from moe_kernels.routing import reference

MAX_EXPERTS = 4096  # routing.cpp keeps a token's probabilities on its stack


def route(
    logits_TE: torch.Tensor, top_k: int, renormalize: bool, *, isa: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `moe_kernels.routing.route`; other dtypes than float32 and bfloat16 are the reference's."""
    num_tokens, num_experts = logits_TE.shape
    if (
        logits_TE.dtype not in (torch.float32, torch.bfloat16)
        or num_experts > MAX_EXPERTS
        or logits_TE.stride(1) != 1
    ):
        return reference.route(logits_TE, top_k, renormalize)
    ids_TK = torch.empty((num_tokens, top_k), dtype=torch.int64, device="cpu")
    weights_TK = logits_TE.new_empty(num_tokens, top_k)
    native_function("moe_route", isa)(
        logits_TE.data_ptr(),
        logits_TE.stride(0),
        num_tokens,
        num_experts,
        top_k,
        renormalize,
        ids_TK.data_ptr(),
        weights_TK.data_ptr(),
        logits_TE.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return ids_TK, weights_TK
