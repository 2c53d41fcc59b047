"""ForwardBatch from a scheduled step: packed tokens, positions, cache places.

Shape legend: T tokens of this rank in the step, B sequences, M block-table width, D decodes among B.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from moe_kernels.sequences import can_pin
from moe_models.batch import ForwardBatch
from moe_runtime.scheduler import ScheduledEntry, ScheduledStep, Sequence

# Kernels are compiled for pointers that are multiples of 16 bytes, and anew for others.
_ALIGNMENT_BYTES = 16


class _Parts:
    """One array that holds several, each at an aligned place, so that one transfer takes all to the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *sizes: int) -> None:
        step = _ALIGNMENT_BYTES // dtype.itemsize
        starts = list(itertools.accumulate((-(-size // step) * step for size in sizes), initial=0))
        self._spans = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self._device = device
        # Only from pinned memory does a copy to a GPU not wait.
        self._whole = torch.empty(starts[-1], dtype=dtype, pin_memory=can_pin(device))

    def on_host(self) -> list[np.ndarray]:
        """The parts, to be filled."""
        whole = self._whole.numpy()
        return [whole[span] for span in self._spans]

    def on_device(self) -> list[torch.Tensor]:
        """The parts as they are now, on the device."""
        whole = self._whole.to(self._device, non_blocking=True)
        return [whole[span] for span in self._spans]


class BatchBuilder:
    """Lays steps out, entry after entry. Keeps the block tables of running sequences between steps.

    A sequence's table is the row of its state slot, which it has for itself as long as it runs; a step copies
    only what is new.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._tables = np.zeros((0, 0), dtype=np.int32)
        self._count = np.arange(1, dtype=np.int32)  # 0, 1, 2 ...: at least one more than there are rows
        # Of each row: the sequence's stamps when it was last copied, and how many blocks were.
        self._stamps: list[int] = []
        self._rewrite_stamps: list[int] = []
        self._counts: list[int] = []

    def build(self, step: ScheduledStep, wanted_N: torch.Tensor | None = None) -> ForwardBatch:
        """The step's batch; a step without entries gives T = B = 0. `wanted_N` as the batch has it."""
        decodes, chunks, size = step.decodes, step.chunks, self._block_size
        num_decodes, num_seqs = len(decodes), len(decodes) + len(chunks)
        num_tokens = step.num_tokens
        starts = [s.num_computed for s in decodes] + [c.start for c in chunks]
        slots = [s.state_slot for s in decodes] + [c.sequence.state_slot for c in chunks]
        self._refresh(decodes, chunks, slots)
        longest = max(max(starts[:num_decodes], default=-1) + 1, *(c.start + c.num_tokens for c in chunks), 0)
        width = -(-longest // size)

        wide = _Parts(self._device, torch.int64, num_tokens, num_tokens, num_tokens, num_seqs)
        token_ids_T, positions_T, kv_slots_T, slots_B = wide.on_host()
        narrow = _Parts(self._device, torch.int32, 1 + num_seqs, num_seqs, num_seqs * width)
        cu_seqlens, contexts_B, flat_tables = narrow.on_host()
        tables_BM = flat_tables.reshape(num_seqs, width)
        slots_B[:] = slots
        contexts_B[:] = starts
        cu_seqlens[: num_decodes + 1] = self._count[: num_decodes + 1]
        tables_BM[:] = self._tables[slots_B, :width]

        token_ids_T[:num_decodes] = [s.token_ids[-1] for s in decodes]
        positions_T[:num_decodes] = contexts_B[:num_decodes]
        self._kv_slots(slots_B[:num_decodes], positions_T[:num_decodes], kv_slots_T[:num_decodes])
        first = num_decodes
        for index, chunk in enumerate(chunks, num_decodes):
            tokens = slice(first, first + chunk.num_tokens)
            first = cu_seqlens[index + 1] = tokens.stop
            end = chunk.start + chunk.num_tokens
            token_ids_T[tokens] = chunk.sequence.token_ids[chunk.start : end]
            positions_T[tokens] = np.arange(chunk.start, end)
            self._kv_slots(slots_B[index], positions_T[tokens], kv_slots_T[tokens])
            # Shared blocks are read and never written: what is there already goes to the padding block.
            shared = max(0, min(chunk.kv_from, end) - chunk.start)
            kv_slots_T[tokens][:shared] %= size

        token_ids, positions, kv_slots, state_slots = wide.on_device()
        cu, contexts, tables = narrow.on_device()
        return ForwardBatch(
            token_ids_T=token_ids,
            positions_T=positions,
            cu_seqlens=cu,
            context_lens_B=contexts,
            block_tables_BM=tables.view(num_seqs, width),
            kv_slots_T=kv_slots,
            state_slots_B=state_slots,
            query_lens=(1,) * num_decodes + tuple([c.num_tokens for c in chunks]),
            context_lens=tuple(starts),
            num_decodes=num_decodes,
            state_checkpoints=tuple(
                [
                    (index, *checkpoint)
                    for index, chunk in enumerate(chunks, num_decodes)
                    for checkpoint in chunk.checkpoints
                ]
            ),
            wanted_N=wanted_N,
        )

    def _kv_slots(self, rows: np.ndarray, positions: np.ndarray, out: np.ndarray) -> None:
        """Where each position's key and value go: its block's id times the block size, plus its place there."""
        blocks, offsets = np.divmod(positions, self._block_size)
        np.multiply(self._tables[rows, blocks], self._block_size, out=out)
        out += offsets

    def _refresh(
        self, decodes: tuple[Sequence, ...], chunks: tuple[ScheduledEntry, ...], slots: list[int]
    ) -> None:
        """Copy the block tables that changed since the last step."""
        if slots and max(slots) >= len(self._stamps):
            self._grow(max(slots) + 1, 0)
        stamps = self._stamps
        stale = [s for s in decodes if s.table_stamp != stamps[s.state_slot]]
        stale += [c.sequence for c in chunks if c.sequence.table_stamp != stamps[c.sequence.state_slot]]
        for sequence in stale:
            row, table = sequence.state_slot, sequence.block_table
            if len(table) > self._tables.shape[1]:
                self._grow(0, len(table))
            same = self._rewrite_stamps[row] == sequence.rewrite_stamp
            copied = self._counts[row] if same else 0
            self._tables[row, copied : len(table)] = table[copied:]
            stamps[row], self._rewrite_stamps[row] = sequence.table_stamp, sequence.rewrite_stamp
            self._counts[row] = len(table)

    def _grow(self, rows: int, width: int) -> None:
        """Make room for so many rows and columns, and as many again, so that it happens rarely."""
        old_rows, old_width = self._tables.shape
        new_rows = old_rows if rows <= old_rows else 2 * rows
        new_width = old_width if width <= old_width else 2 * width
        tables = np.zeros((new_rows, new_width), dtype=np.int32)
        tables[:old_rows, :old_width] = self._tables
        self._tables = tables
        self._count = np.arange(new_rows + 1, dtype=np.int32)
        for kept in (self._stamps, self._rewrite_stamps, self._counts):
            kept += [0] * (new_rows - old_rows)
