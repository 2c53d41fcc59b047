"""What the kernels need of a ForwardBatch."""

from __future__ import annotations

from moe_kernels.sequences import PackedSequences
from moe_models.batch import ForwardBatch


def packed_sequences(batch: ForwardBatch) -> PackedSequences:
    """The batch's sequence boundaries; no copy."""
    return PackedSequences(
        cu_seqlens=batch.cu_seqlens,
        context_lens_B=batch.context_lens_B,
        query_lens=batch.query_lens,
        context_lens=batch.context_lens,
        num_decodes=batch.num_decodes,
        state_checkpoints=batch.state_checkpoints,
    )
