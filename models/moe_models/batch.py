"""ForwardBatch: what one rank computes in one step, as packed tokens of many sequences.

Shape legend: T tokens of this rank in the step, N of them wanted, B sequences, M block-table width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import add

import torch

from moe_kernels.sequences import PackedSequences


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """Packed tokens of B sequences; prefill chunks and decode tokens stand in one batch, no padding.

    Sequences that decode (one token, some context) come first. T and B may be zero: the rank then takes
    part in the step's collectives with no tokens. Tensors are filled by the runner, on the rank's device;
    the tuples are the same numbers on the host, so that no kernel launch needs a device read-back.
    """

    token_ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64, position of each token in its sequence
    cu_seqlens: torch.Tensor  # int32 [B + 1], where each sequence's tokens start in T
    context_lens_B: torch.Tensor  # int32, tokens of the sequence already in the caches before this step
    block_tables_BM: torch.Tensor  # int32, KV block ids of each sequence; any valid ids past its length
    kv_slots_T: torch.Tensor  # int64, block_id * block_size + offset: where the token's key and value go
    state_slots_B: torch.Tensor  # int64, slot of the sequence's DeltaNet and convolution state
    query_lens: tuple[int, ...]  # tokens of each sequence in this step
    context_lens: tuple[int, ...]  # the same as context_lens_B
    num_decodes: int  # sequences at the front with query_len == 1 and context_len > 0
    # (index in B, n, slot): the sequence's state after its first n tokens of this step is written to slot, too.
    # Only of sequences after the decodes, in order of B and n; no slot is another's.
    state_checkpoints: tuple[tuple[int, int, int], ...] = ()
    # int64 [N], ascending: the tokens whose hidden states are wanted, such as the last one of each prompt; None: all.
    wanted_N: torch.Tensor | None = None
    # What the kernels need of the above; one object for all layers, since it keeps what they derive from it.
    sequences: PackedSequences = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sequences = PackedSequences(
            cu_seqlens=self.cu_seqlens,
            context_lens_B=self.context_lens_B,
            query_lens=self.query_lens,
            context_lens=self.context_lens,
            num_decodes=self.num_decodes,
            state_checkpoints=self.state_checkpoints,
        )
        object.__setattr__(self, "sequences", sequences)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids_T.shape[0]

    @property
    def num_seqs(self) -> int:
        """B."""
        return len(self.query_lens)

    @property
    def end(self) -> int:
        """One past the furthest position of its tokens."""
        return max(map(add, self.context_lens, self.query_lens), default=0)
