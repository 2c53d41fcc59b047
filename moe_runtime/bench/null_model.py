"""NullModel: stands where a model stands and computes nothing, so that what is left is the engine.

Shape legend: T tokens of a step, B sequences, N rows of logits, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from moe_models.batch import ForwardBatch

# Steps whose logits differ before they come round again.
_NUM_VARIANTS = 64
# Probability falls with rank as rank ** -1.5: 38% for the best token, 90% for the best 60.
_ZIPF_EXPONENT = 1.5


class NullModel(nn.Module):
    """Has logits of a likely shape, made once; `batch` is the last one that it was given."""

    def __init__(self, num_seqs: int, vocab_size: int, num_texts: int, seed: int = 0) -> None:
        """
        Args:
            num_seqs: rows of logits that a step asks for at most.
            num_texts: the best token is one of the first so many of the vocabulary, which have a text.
        """
        super().__init__()
        self._at = nn.Parameter(torch.zeros(1), requires_grad=False)  # tells the runner the device
        self.batch: ForwardBatch | None = None
        self._hidden_TH = torch.zeros(0, 1)
        self._logits_NV = _zipf_logits(num_seqs + _NUM_VARIANTS, vocab_size, num_texts, seed)
        self._num_calls = 0

    def forward(self, batch: ForwardBatch, caches: object, dispatcher: object) -> torch.Tensor:
        """Zeros [T, 1]."""
        self.batch = batch
        if self._hidden_TH.shape[0] < batch.num_tokens:
            self._hidden_TH = torch.zeros(batch.num_tokens, 1)
        return self._hidden_TH[: batch.num_tokens]

    def compute_logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """N rows of the fixed logits [N, V], others at the next call: a view, nothing is computed."""
        self._num_calls += 1
        first = self._num_calls % _NUM_VARIANTS
        return self._logits_NV[first : first + hidden_NH.shape[0]]


def _zipf_logits(num_rows: int, vocab_size: int, num_texts: int, seed: int) -> torch.Tensor:
    """Float32 logits whose ranks lie scattered over the vocabulary, another way in each row."""
    generator = torch.Generator().manual_seed(seed)
    ranks_V = torch.randperm(vocab_size, generator=generator) + 2.0
    logits_V = -_ZIPF_EXPONENT * ranks_V.log()
    logits_NV = torch.stack([logits_V.roll(row) for row in range(num_rows)])
    best_N = torch.randint(min(num_texts, vocab_size), (num_rows,), generator=generator)
    logits_NV[torch.arange(num_rows), best_N] = 0.0  # rank 1
    return logits_NV
