"""Runner: one scheduled step through the model, from tokens in to tokens sampled."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from moe_models.interfaces import CausalLM, LayerCache, TokenDispatcher
from moe_runtime.batching import build_batch
from moe_runtime.sampling import Sampler, SamplingBatch, SamplingRow, prompt_logprobs
from moe_runtime.sampling.logprobs import RankedLogprobs
from moe_runtime.scheduler import ScheduledEntry, ScheduledStep, Sequence

# Logits of a long prompt chunk are made in parts: 64 MB of float32 at a time.
_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave; the runner makes it, the worker hands it to the scheduler and to the client."""

    token_ids: list[int]  # one for each of the step's `sampled` sequences, in that order
    logprobs: list[RankedLogprobs | None]  # the same
    prompt_logprobs: dict[Sequence, list[RankedLogprobs]]  # of the prompt tokens that this step predicts


class Runner:
    """The model and its caches on this rank."""

    def __init__(
        self, model: CausalLM, caches: tuple[LayerCache, ...], *, block_size: int, vocab_size: int
    ) -> None:
        self._model = model
        self._caches = caches
        self._block_size = block_size
        self._logits_rows_at_once = max(1, _LOGITS_AT_ONCE // vocab_size)
        self._device = next(model.parameters()).device
        self._sampler = Sampler()

    @torch.inference_mode()
    def run(self, step: ScheduledStep, dispatcher: TokenDispatcher) -> StepResult:
        """Run a step; one without entries still takes part in the ranks' collectives."""
        batch = build_batch(step, self._block_size, self._device)
        hidden_TH = self._model(batch, self._caches, dispatcher)
        last_rows = [
            end - 1
            for entry, end in zip(step.entries, accumulate(batch.query_lens), strict=True)
            if entry.needs_logits
        ]
        if not last_rows:
            return StepResult([], [], self._prompt_logprobs(step, hidden_TH))
        rows = torch.tensor(last_rows, device=self._device)
        sampling = SamplingBatch(tuple(_sampling_row(sequence) for sequence in step.sampled))
        sampled = self._sampler(self._model.compute_logits(hidden_TH[rows]), sampling)
        return StepResult(sampled.token_ids, sampled.logprobs, self._prompt_logprobs(step, hidden_TH))

    def _prompt_logprobs(
        self, step: ScheduledStep, hidden_TH: torch.Tensor
    ) -> dict[Sequence, list[RankedLogprobs]]:
        found: dict[Sequence, list[RankedLogprobs]] = {}
        start = 0
        for entry in step.entries:
            request = entry.sequence.request
            wanted = request.params.prompt_logprobs
            if wanted is not None and entry.start + 1 < len(request.prompt_token_ids):
                rows = hidden_TH[start : start + entry.num_tokens]
                found[entry.sequence] = self._logprobs_of_chunk(entry, rows, wanted)
            start += entry.num_tokens
        return found

    def _logprobs_of_chunk(
        self, entry: ScheduledEntry, hidden_QH: torch.Tensor, num_best: int
    ) -> list[RankedLogprobs]:
        """Of the prompt tokens that the chunk's tokens predict: each predicts its successor."""
        next_ids = entry.sequence.request.prompt_token_ids[
            entry.start + 1 : entry.start + 1 + entry.num_tokens
        ]
        found: list[RankedLogprobs] = []
        for start in range(0, len(next_ids), self._logits_rows_at_once):
            ids = next_ids[start : start + self._logits_rows_at_once]
            logits = self._model.compute_logits(hidden_QH[start : start + len(ids)])
            found += prompt_logprobs(logits, ids, num_best)
        return found


def _sampling_row(sequence: Sequence) -> SamplingRow:
    return SamplingRow.of(sequence.request, sequence.output_ids)
