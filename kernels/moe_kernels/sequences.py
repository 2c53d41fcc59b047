"""PackedSequences: where each sequence's tokens stand in a packed batch.

Shape legend: T tokens in the step, B sequences, S sequences with a prefill, C chunks, L tiles, P checkpoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

PREFILL_CHUNK = 64  # tokens of a chunk or tile at most
_ALIGNED = (
    4  # int32 values in 16 bytes: kernels are compiled for pointers to multiples of them, and anew for others
)

_SERIALS = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTables:
    """The work of a step's prefills for kernels with a state: int32 tensors, views of one copy to the device."""

    # First token in T, number of tokens, slot that the state after them is also written to or -1. Counted
    # anew after each checkpoint.
    chunks_C3: torch.Tensor
    # Index in B, 1 if it has context, first token in T, number of tokens, first chunk, end of its chunks, first
    # checkpoint, end of its checkpoints.
    sequences_S8: torch.Tensor
    tiles_L2: torch.Tensor  # row of sequences_S8, offset in the sequence; counted on over checkpoints
    checkpoints_P2: torch.Tensor  # tokens of the sequence before it, slot


@dataclass(frozen=True, kw_only=True)
class PackedSequences:
    """B sequences' tokens one after the other: on the device for kernels, on the host for launching them."""

    cu_seqlens: torch.Tensor  # int32 [B + 1], where each sequence's tokens start in T
    context_lens_B: torch.Tensor  # int32, tokens of the sequence before this step
    query_lens: tuple[int, ...]  # tokens of each sequence in this step
    context_lens: tuple[int, ...]  # the same as context_lens_B
    num_decodes: int  # sequences at the front with one token and some context
    # (index in B, n, slot): operations with a state write it, as it is after the sequence's first n tokens of
    # this step, to that slot as well. Only of sequences after the decodes, in order of B and n.
    state_checkpoints: tuple[tuple[int, int, int], ...] = ()

    @cached_property
    def serial(self) -> int:
        """A number that no other of this process has: what was planned for these sequences is known by it."""
        return next(_SERIALS)

    @cached_property
    def checkpoints_on_host(self) -> torch.Tensor:
        """`state_checkpoints` as int64 [n, 3] in the host's memory."""
        return torch.tensor(self.state_checkpoints, dtype=torch.int64, device="cpu").view(-1, 3)

    def prefills(self) -> Iterator[tuple[int, slice, bool, list[tuple[int, int]]]]:
        """Each sequence after the decodes that has tokens.

        (index in B, tokens in T, has it context, its checkpoints as (n, slot)).
        """
        start, seen = self.num_decodes, 0
        for index in range(self.num_decodes, len(self.query_lens)):
            stop = start + self.query_lens[index]
            checkpoints = []
            while seen < len(self.state_checkpoints) and self.state_checkpoints[seen][0] == index:
                checkpoints.append(self.state_checkpoints[seen][1:])
                seen += 1
            if stop > start:
                yield index, slice(start, stop), self.context_lens[index] > 0, checkpoints
            start = stop

    @cached_property
    def prefill_tables(self) -> PrefillTables | None:
        """What kernels with a state need of the prefills; None for a step of decodes alone.

        Made at the first use, so that all layers of a step share one copy to the device.
        """
        chunks: list[tuple[int, ...]] = []
        sequences: list[tuple[int, ...]] = []
        tiles: list[tuple[int, ...]] = []
        points: list[tuple[int, ...]] = []
        for index, tokens, has_context, checkpoints in self.prefills():
            num_tokens = tokens.stop - tokens.start
            first_chunk, first_point = len(chunks), len(points)
            tiles += [(len(sequences), offset) for offset in range(0, num_tokens, PREFILL_CHUNK)]
            chunks += _chunks(tokens, checkpoints)
            points += checkpoints
            span = (first_chunk, len(chunks), first_point, len(points))
            sequences.append((index, int(has_context), tokens.start, num_tokens, *span))
        if not sequences:
            return None
        tables = _to_device([(chunks, 3), (sequences, 8), (tiles, 2), (points, 2)], self.cu_seqlens.device)
        return PrefillTables(
            chunks_C3=tables[0], sequences_S8=tables[1], tiles_L2=tables[2], checkpoints_P2=tables[3]
        )

    @cached_property
    def decode_tokens(self) -> tuple[int, int]:
        """Tokens that the longest of the decodes attends to, and that all of them do."""
        lengths = [context + 1 for context in self.context_lens[: self.num_decodes]]
        return max(lengths, default=0), sum(lengths)

    @cached_property
    def prefill_cu_seqlens(self) -> torch.Tensor:
        """int64 [S + 1] on the device: where the sequences of `prefill_tables` start, from the first of them."""
        n = self.num_decodes
        return self._int64([0, *(tokens.stop - n for _, tokens, _, _ in self.prefills())])

    @cached_property
    def prefill_chunk_indices(self) -> torch.Tensor:
        """int64 [L, 2] on the device: each chunk's row of `prefill_tables.sequences_S8`, and its number there.

        Counted from a sequence's first token in this step, over checkpoints, too.
        """
        counts = [-(-(tokens.stop - tokens.start) // PREFILL_CHUNK) for _, tokens, _, _ in self.prefills()]
        return self._int64([(row, i) for row, count in enumerate(counts) for i in range(count)])

    def _int64(self, values: Sequence[int] | Sequence[tuple[int, int]]) -> torch.Tensor:
        device = self.cu_seqlens.device
        host = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=can_pin(device))
        return host.to(device, non_blocking=True)


def _chunks(tokens: slice, checkpoints: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """A sequence's rows of `PrefillTables.chunks_C3`."""
    start = tokens.start
    for stop, slot in [*((tokens.start + n, slot) for n, slot in checkpoints), (tokens.stop, -1)]:
        for first in range(start, stop, PREFILL_CHUNK):
            size = min(PREFILL_CHUNK, stop - first)
            yield first, size, slot if first + size == stop else -1
        start = stop


def _to_device(tables: list[tuple[list[tuple[int, ...]], int]], device: torch.device) -> list[torch.Tensor]:
    """Tables of (rows, columns) as tensors of `device`, with one copy that the host does not wait for."""
    flat: list[int] = []
    starts = []
    for rows, _ in tables:
        flat += [0] * (-len(flat) % _ALIGNED)
        starts.append(len(flat))
        flat += [value for row in rows for value in row]
    host = torch.tensor(flat, dtype=torch.int32, device="cpu", pin_memory=can_pin(device))
    packed = host.to(device, non_blocking=True)
    # `narrow`, since fake CUDA tensors cannot be indexed with slices in a build without CUDA.
    return [
        packed.narrow(0, start, len(rows) * columns).view(-1, columns)
        for start, (rows, columns) in zip(starts, tables, strict=True)
    ]


def can_pin(device: torch.device) -> bool:
    """Whether copies to this device need pinned memory for the host not to wait for them."""
    # Where there is no GPU, fake CUDA tensors are still dry-run, and there is nothing to pin memory with.
    return device.type == "cuda" and torch.cuda.is_available()
