"""ForwardBatch from a scheduled step: packed tokens, positions, cache places.

Shape legend: T tokens of this rank in the step, B sequences, M block-table width.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from moe_models.batch import ForwardBatch
from moe_runtime.scheduler import ScheduledEntry, ScheduledStep


def build_batch(step: ScheduledStep, block_size: int, device: torch.device) -> ForwardBatch:
    """Lay out the step's tokens, entry after entry; a step without entries gives T = B = 0."""
    entries = step.entries
    query_lens = tuple(entry.num_tokens for entry in entries)
    context_lens = tuple(entry.start for entry in entries)
    token_ids = [t for e in entries for t in e.sequence.token_ids[e.start : e.start + e.num_tokens]]
    positions = [p for e in entries for p in range(e.start, e.start + e.num_tokens)]
    kv_slots = [slot for entry in entries for slot in _kv_slots(entry, block_size)]
    # Only the blocks that the step can read: admission reserves more.
    tables = [e.sequence.block_table[: -(-(e.start + e.num_tokens) // block_size)] for e in entries]
    width = max(map(len, tables), default=0)
    padded = [table + [0] * (width - len(table)) for table in tables]

    def on_device(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return ForwardBatch(
        token_ids_T=on_device(token_ids, torch.int64),
        positions_T=on_device(positions, torch.int64),
        cu_seqlens=on_device([0, *accumulate(query_lens)], torch.int32),
        context_lens_B=on_device(list(context_lens), torch.int32),
        block_tables_BM=on_device(padded, torch.int32).view(len(entries), width),
        kv_slots_T=on_device(kv_slots, torch.int64),
        state_slots_B=on_device([e.sequence.state_slot for e in entries], torch.int64),
        query_lens=query_lens,
        context_lens=context_lens,
        num_decodes=step.num_decodes,
    )


def _kv_slots(entry: ScheduledEntry, block_size: int) -> list[int]:
    """Where each token's key and value go: its block's id times the block size, plus its place there."""
    table = entry.sequence.block_table
    positions = range(entry.start, entry.start + entry.num_tokens)
    return [table[p // block_size] * block_size + p % block_size for p in positions]
