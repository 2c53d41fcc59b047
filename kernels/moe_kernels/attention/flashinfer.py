"""Paged attention by FlashInfer (Apache-2.0), imported at the first call; keys and values are written by our kernel.

FlashInfer divides a step's work on the host before it runs, once for all layers: the wrappers of a device keep
what they planned last, and for which step. It takes the caches as they are, in its layout "NHD".

Shape legend: T tokens, B sequences, M block-table width (key heads in TMD), N query heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_kernels.attention.triton import write_kv
from moe_kernels.custom_op import custom_op
from moe_kernels.sequences import PackedSequences, can_pin

_WORKSPACE_BYTES = 128 << 20  # what its documentation recommends


def paged_attention(
    q_TND: torch.Tensor,
    k_TMD: torch.Tensor,
    v_TMD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots_T: torch.Tensor,
    block_tables_BM: torch.Tensor,
    sequences: PackedSequences,
    scale: float,
    gate_TND: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `moe_kernels.attention.paged_attention`; bfloat16 and float16, heads of 64, 128 or 256 values."""
    return _paged_attention(
        q_TND,
        k_TMD,
        v_TMD,
        k_cache,
        v_cache,
        kv_slots_T,
        block_tables_BM,
        sequences.serial,
        sequences.num_decodes,
        sequences.query_lens,
        sequences.context_lens,
        scale,
        gate_TND,
    )


@dataclass(slots=True)
class _Wrappers:
    """FlashInfer's wrappers on one device, and what they are planned for: step and sizes."""

    decode: Any
    prefill: Any
    planned: tuple[Any, ...] | None = None
    # After the last plan's copies, which begin in memory that the next plan fills anew; None: nothing is copied.
    copied: torch.cuda.Event | None = None


@functools.cache
def _wrappers(device: torch.device) -> _Wrappers:
    import flashinfer

    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return _Wrappers(
        # Its kernels without tensor cores compute the query heads of a key head one after the other.
        decode=flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True),
        prefill=flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD"),
        copied=torch.cuda.Event() if can_pin(device) else None,
    )


def _empty_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    block_tables: torch.Tensor,
    step: int,
    num_decodes: int,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
    gate: torch.Tensor | None,
) -> torch.Tensor:
    return q.new_empty(q.shape)


@custom_op(
    "paged_attention_flashinfer(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor slots, Tensor block_tables, int step, int num_decodes, int[] query_lens, int[] context_lens, "
    "float scale, Tensor? gate) -> Tensor",
    fake=_empty_out,
)
def _paged_attention(
    q_TND: torch.Tensor,
    k_TMD: torch.Tensor,
    v_TMD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots_T: torch.Tensor,
    block_tables_BM: torch.Tensor,
    step: int,
    num_decodes: int,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
    gate_TND: torch.Tensor | None,
) -> torch.Tensor:
    write_kv(k_TMD, v_TMD, k_cache, v_cache, kv_slots_T)
    num_tokens = q_TND.shape[0]
    if not num_tokens:
        return torch.empty_like(q_TND)
    wrappers = _wrappers(q_TND.device)
    wanted = (step, scale, q_TND.dtype, q_TND.shape[1:], k_cache.shape[1:])
    if wrappers.planned != wanted:
        if wrappers.copied is not None:
            wrappers.copied.synchronize()
        _plan(wrappers, q_TND, k_cache, block_tables_BM, num_decodes, query_lens, context_lens, scale)
        wrappers.planned = wanted
        if wrappers.copied is not None:
            wrappers.copied.record()
    q, caches = q_TND.contiguous(), (k_cache, v_cache)
    parts = []
    if num_decodes:
        parts.append(wrappers.decode.run(q.narrow(0, 0, num_decodes), caches))
    if num_tokens > num_decodes:
        rest = q.narrow(0, num_decodes, num_tokens - num_decodes)
        parts.append(wrappers.prefill.run(rest, caches))
    out_TND = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out_TND if gate_TND is None else out_TND * torch.sigmoid(gate_TND)


def _plan(
    wrappers: _Wrappers,
    q_TND: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables_BM: torch.Tensor,
    num_decodes: int,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
) -> None:
    (_, heads, head_size), (_, block_size, kv_heads, _) = q_TND.shape, k_cache.shape
    sizes = (heads, kv_heads, head_size, block_size)
    options = {"sm_scale": scale, "q_data_type": q_TND.dtype, "kv_data_type": k_cache.dtype}
    lengths = [q + c for q, c in zip(query_lens, context_lens, strict=True)]
    if num_decodes:
        rows = range(num_decodes)
        wrappers.decode.plan(*_pages(rows, lengths, block_tables_BM, block_size), *sizes, **options)
    # A sequence without tokens has nothing to plan.
    rest = [row for row in range(num_decodes, len(lengths)) if query_lens[row]]
    if rest:
        starts = _starts([query_lens[row] for row in rest], q_TND.device)
        pages = _pages(rest, lengths, block_tables_BM, block_size)
        wrappers.prefill.plan(starts, *pages, *sizes, causal=True, **options)


def _pages(
    rows: Sequence[int], lengths: Sequence[int], block_tables_BM: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each of these sequences' pages start, their ids, and the tokens in its last page; int32.

    The ids are on the device and the others on the host, which FlashInfer reads: it would wait for the device.
    """
    device, width = block_tables_BM.device, block_tables_BM.shape[1]
    counts = [-(-lengths[row] // block_size) for row in rows]
    starts = _starts(counts, device)
    first = torch.tensor([row * width for row in rows], dtype=torch.int64, device="cpu") - starts[:-1]
    at = torch.repeat_interleave(first, starts.diff()) + torch.arange(sum(counts), device="cpu")
    if can_pin(device):
        at = at.pin_memory()
    ids = block_tables_BM.flatten().index_select(0, at.to(device, non_blocking=True))
    last = torch.tensor(
        [(lengths[row] - 1) % block_size + 1 for row in rows], dtype=torch.int32, device="cpu"
    )
    return starts, ids, last.pin_memory() if can_pin(device) else last


def _starts(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Sums of the first 0, 1, 2 ... counts: int32 in the host's memory, pinned for copies to `device`."""
    starts = torch.tensor([0, *counts], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
    return starts.pin_memory() if can_pin(device) else starts
