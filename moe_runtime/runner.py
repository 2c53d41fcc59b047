"""Runner: one scheduled step through the model, from tokens in to tokens sampled."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from moe_kernels.sequences import can_pin
from moe_models.interfaces import CausalLM, LayerCache, TokenDispatcher
from moe_runtime.batching import BatchBuilder
from moe_runtime.cache.copies import copy_blocks, copy_states
from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.grammar.masks import MaskFiller, StepMasks
from moe_runtime.grammar.matcher import TokenMatcher
from moe_runtime.sampling import Sampler, SamplingBatch, SamplingRow, TokenMask, prompt_logprobs
from moe_runtime.sampling.logprobs import RankedLogprobs
from moe_runtime.scheduler import ScheduledStep, Sequence

# Logits of a long prompt chunk are made in parts: 64 MB of float32 at a time.
_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave; the runner makes it, the worker hands it to the scheduler and to the client."""

    token_ids: list[int]  # one for each of the step's `sampled` sequences, in that order
    logprobs: list[RankedLogprobs | None]  # the same
    prompt_logprobs: dict[Sequence, list[RankedLogprobs]]  # of the prompt tokens that this step predicts
    # Sampled sequences that cannot go on, and why; their token means nothing.
    failed: dict[Sequence, MoeRuntimeError] = field(default_factory=dict)


class Runner:
    """The model and its caches on this rank."""

    def __init__(
        self,
        model: CausalLM,
        caches: tuple[LayerCache, ...],
        *,
        block_size: int,
        vocab_size: int,
        num_mask_threads: int = 1,
    ) -> None:
        """
        Args:
            num_mask_threads: that work on the masks of structured sequences while the model runs.
        """
        self._model = model
        self._caches = caches
        self._logits_rows_at_once = max(1, _LOGITS_AT_ONCE // vocab_size)
        self._device = next(model.parameters()).device
        self._batches = BatchBuilder(block_size, self._device)
        self._sampler = Sampler()
        self._masks = MaskFiller(vocab_size, num_threads=num_mask_threads, on_gpu=self._device.type == "cuda")

    @torch.inference_mode()
    def run(self, step: ScheduledStep, dispatcher: TokenDispatcher) -> StepResult:
        """Run a step; one without entries still takes part in the ranks' collectives."""
        if step.state_copies:
            copy_states(self._caches, step.state_copies)
        if step.block_copies:
            copy_blocks(self._caches, step.block_copies)
        sampling = SamplingBatch(tuple([_sampling_row(sequence) for sequence in step.sampled]))
        masks = self._start_masks(step, sampling) if sampling.structured else None
        rows_N = self._sampled_rows(step) if step.chunks else None
        wants_prompts = any(c.sequence.request.params.prompt_logprobs is not None for c in step.chunks)
        batch = self._batches.build(step, None if wants_prompts else rows_N)
        hidden = self._model(batch, self._caches, dispatcher)
        prompts = self._prompt_logprobs(step, hidden) if wants_prompts else {}
        if not step.sampled:
            return StepResult([], [], prompts)
        if rows_N is not None and hidden.shape[0] != rows_N.shape[0]:
            hidden = hidden[rows_N]
        logits_NV = self._model.compute_logits(hidden)
        if masks is None:
            sampled = self._sampler(logits_NV, sampling)
            return StepResult(sampled.token_ids, sampled.logprobs, prompts)
        return self._sample_structured(step, sampling, logits_NV, masks, prompts)

    def _start_masks(self, step: ScheduledStep, sampling: SamplingBatch) -> StepMasks:
        matchers = [step.sampled[i].matcher for i in sampling.structured]
        assert all(isinstance(matcher, TokenMatcher) for matcher in matchers), "a grammar was not waited for"
        return self._masks.start(matchers)  # type: ignore[arg-type]

    def _sample_structured(
        self,
        step: ScheduledStep,
        sampling: SamplingBatch,
        logits_NV: torch.Tensor,
        masks: StepMasks,
        prompts: dict[Sequence, list[RankedLogprobs]],
    ) -> StepResult:
        allowed_SW, errors = masks.join()
        good = [s for s in range(len(sampling.structured)) if s not in errors]
        mask = TokenMask(
            tuple(sampling.structured[s] for s in good), allowed_SW[good] if errors else allowed_SW
        )
        sampled = self._sampler(logits_NV, sampling, mask)
        failed = {step.sampled[sampling.structured[s]]: error for s, error in errors.items()}
        failed |= {step.sampled[row]: _no_token_left() for row in sampled.stuck}
        return StepResult(sampled.token_ids, sampled.logprobs, prompts, failed)

    def _sampled_rows(self, step: ScheduledStep) -> torch.Tensor:
        """The tokens of `step.sampled`: each decode's one, and the last one of each finished prompt."""
        rows = list(range(step.num_decodes))
        end = step.num_decodes
        for chunk in step.chunks:
            end += chunk.num_tokens
            if chunk.needs_logits:
                rows.append(end - 1)
        host = torch.tensor(rows, dtype=torch.int64, pin_memory=can_pin(self._device))
        return host.to(self._device, non_blocking=True)

    def _prompt_logprobs(
        self, step: ScheduledStep, hidden_TH: torch.Tensor
    ) -> dict[Sequence, list[RankedLogprobs]]:
        """Logprobs of the prompt tokens that the step's chunks predict, but for those that were reported.

        A prompt that was preempted is computed again, its logprobs are not reported again.
        """
        found: dict[Sequence, list[RankedLogprobs]] = {}
        row = step.num_decodes
        for entry in step.chunks:
            request = entry.sequence.request
            wanted = request.params.prompt_logprobs
            first = max(entry.start, entry.sequence.num_reported)
            end = min(entry.start + entry.num_tokens, len(request.prompt_token_ids) - 1)
            if wanted is not None and first < end:
                rows = hidden_TH[row + first - entry.start : row + end - entry.start]
                next_ids = request.prompt_token_ids[first + 1 : end + 1]
                found[entry.sequence] = self._logprobs_of_rows(rows, next_ids, wanted)
            row += entry.num_tokens
        return found

    def _logprobs_of_rows(
        self, hidden_QH: torch.Tensor, next_ids: tuple[int, ...], num_best: int
    ) -> list[RankedLogprobs]:
        """Of prompt tokens, each predicted by the row of the one before it."""
        found: list[RankedLogprobs] = []
        for start in range(0, len(next_ids), self._logits_rows_at_once):
            ids = next_ids[start : start + self._logits_rows_at_once]
            logits = self._model.compute_logits(hidden_QH[start : start + len(ids)])
            found += prompt_logprobs(logits, ids, num_best)
        return found


def _sampling_row(sequence: Sequence) -> SamplingRow:
    """Made once a sequence: its lists grow by themselves."""
    row = sequence.sampling_row
    if row is None:
        row = sequence.sampling_row = SamplingRow.of(sequence.request, sequence.output_ids)
    assert isinstance(row, SamplingRow)
    return row


def _no_token_left() -> ConfigError:
    return ConfigError(
        "structured_outputs and logit_bias leave no token to sample; take the -inf of logit_bias from a token "
        "that the grammar needs"
    )
