"""Softmax and top-k on GPUs, in one launch.

Shape legend: T tokens, E logical experts, K top-k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.custom_op import custom_op


@triton.jit
def route_kernel(
    logits,
    ids,
    weights,
    stride,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """Program (token): all its probabilities stay in registers, and the best is taken out TOP_K times."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    choice = tl.arange(0, CHOICES)
    there = expert < NUM_EXPERTS
    values = tl.load(logits + token * stride + expert, mask=there, other=-float("inf")).to(tl.float32)
    values = tl.exp(values - tl.max(values, axis=0))
    total = tl.sum(values, axis=0)
    values = tl.where(there, values, -1.0)
    chosen = tl.zeros([CHOICES], dtype=tl.float32)
    chosen_ids = tl.zeros([CHOICES], dtype=tl.int64)
    for k in tl.static_range(TOP_K):
        best = tl.max(values, axis=0)
        # The lowest of the experts that tie; one that is there, whatever NaN the row may hold.
        best_id = tl.minimum(tl.min(tl.where(values == best, expert, EXPERTS), axis=0), NUM_EXPERTS - 1)
        chosen = tl.where(choice == k, best, chosen)
        chosen_ids = tl.where(choice == k, best_id.to(tl.int64), chosen_ids)
        values = tl.where(expert == best_id, -1.0, values)
    if RENORMALIZE:
        total = tl.sum(chosen, axis=0)
    at = token * TOP_K + choice
    tl.store(ids + at, chosen_ids, mask=choice < TOP_K)
    tl.store(weights + at, (chosen / total).to(weights.dtype.element_ty), mask=choice < TOP_K)


def _fake(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape)


@custom_op("route(Tensor logits, int top_k, bool renormalize) -> (Tensor, Tensor)", fake=_fake)
def route(logits_TE: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """See `moe_kernels.routing.route`."""
    num_tokens, num_experts = logits_TE.shape
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    ids_TK, weights_TK = _fake(logits_TE, top_k, renormalize)
    if num_tokens:
        route_kernel[(num_tokens,)](
            logits_TE,
            ids_TK,
            weights_TK,
            logits_TE.stride(0),
            RENORMALIZE=renormalize,
            num_warps=route_warps(num_experts),
            **route_sizes(num_experts, top_k),
        )
    return ids_TK, weights_TK


def route_sizes(num_experts: int, top_k: int) -> dict[str, int]:
    """The kernel's constants that a model decides."""
    return {
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "EXPERTS": triton.next_power_of_2(num_experts),
        "CHOICES": triton.next_power_of_2(top_k),
    }


def route_warps(num_experts: int) -> int:
    """Warps of the program of a token: a row of few experts needs no exchange between any."""
    return 1 if num_experts <= 128 else 4
