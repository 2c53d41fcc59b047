"""Changes that can move the best token: logit_bias, min_tokens, the three penalties and grammars, in that order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from moe_runtime.sampling.batch import SamplingBatch, SamplingRow
from moe_runtime.sampling.mask import TokenMask, apply_mask

IndexedRow = tuple[int, SamplingRow]  # index into the logits, and the row


def adjust_logits(
    logits_NV: torch.Tensor, batch: SamplingBatch, mask: TokenMask | None = None
) -> torch.Tensor:
    """Float32 logits [N, V] after logit_bias, min_tokens, penalties and `mask`; the input is never changed.

    Rows that ask for none of these cost nothing, and where no row does no copy is made.
    """
    rows = list(enumerate(batch.rows))
    biased = [(i, row) for i, row in rows if row.params.logit_bias]
    masked = [(i, row) for i, row in rows if row.needs_stop_mask]
    penalised = [(i, row) for i, row in rows if row.has_penalty]
    x_NV = logits_NV.float()
    if not (biased or masked or penalised or mask):
        return x_NV
    if x_NV is logits_NV:
        x_NV = x_NV.clone()
    if biased:
        _add_bias(x_NV, biased)
    if masked:
        _mask_stop_ids(x_NV, masked)
    if penalised:
        _penalise_repetition(x_NV, [(i, row) for i, row in penalised if row.params.repetition_penalty != 1])
        _penalise_counts(x_NV, penalised)
    if mask:
        apply_mask(x_NV, mask)
    return x_NV


def _add_bias(x_NV: torch.Tensor, rows: list[IndexedRow]) -> None:
    entries = [(i, token, value) for i, row in rows for token, value in (row.params.logit_bias or {}).items()]
    row_index, tokens, values = zip(*entries, strict=True)
    at = _indices(x_NV, row_index, tokens)
    x_NV[at] += torch.tensor(values, dtype=torch.float32, device=x_NV.device)


def _mask_stop_ids(x_NV: torch.Tensor, rows: list[IndexedRow]) -> None:
    # A generation config may name ids that this model's head does not have.
    entries = [(i, token) for i, row in rows for token in row.stop_ids if token < x_NV.shape[1]]
    if entries:
        row_index, tokens = zip(*entries, strict=True)
        x_NV[_indices(x_NV, row_index, tokens)] = -math.inf


def _penalise_repetition(x_NV: torch.Tensor, rows: list[IndexedRow]) -> None:
    """Divide positive and multiply other logits of tokens in prompt or output (Keskar et al. 2019, CTRL).

    Tokens may repeat among the indices: every copy then writes the same value.
    """
    for i, row in rows:
        seen = torch.tensor([*row.prompt_token_ids, *row.output_token_ids], device=x_NV.device)
        x_S = x_NV[i, seen]
        penalty = row.params.repetition_penalty
        x_NV[i, seen] = torch.where(x_S > 0, x_S / penalty, x_S * penalty)


def _penalise_counts(x_NV: torch.Tensor, rows: list[IndexedRow]) -> None:
    """Subtract count * frequency_penalty + (count > 0) * presence_penalty, over tokens of the output."""
    for i, row in rows:
        p = row.params
        if row.output_token_ids and (p.frequency_penalty or p.presence_penalty):
            outputs = torch.tensor(list(row.output_token_ids), device=x_NV.device)
            tokens, counts = outputs.unique(return_counts=True)
            x_NV[i, tokens] -= counts * p.frequency_penalty + p.presence_penalty


def _indices(
    x_NV: torch.Tensor, rows: Sequence[int], tokens: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(rows, device=x_NV.device), torch.tensor(tokens, device=x_NV.device)
