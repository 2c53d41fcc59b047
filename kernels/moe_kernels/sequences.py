"""PackedSequences: where each sequence's tokens stand in a packed batch.

Shape legend: T tokens in the step, B sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
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
