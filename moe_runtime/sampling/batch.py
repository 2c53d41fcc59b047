"""SamplingRow and SamplingBatch: what the sampler knows about the sequence behind each row of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_runtime.request import EngineRequest, SamplingParams, stop_ids


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SamplingRow:
    """One sequence, made when it starts and used at every step: `output_token_ids` is its live list.

    The runner makes it; the scheduler appends to the list.
    """

    params: SamplingParams
    seed: int
    sample_index: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]  # grows by one token a step
    stop_ids: frozenset[int]  # not sampled before there are `params.min_tokens` tokens
    # What the row asks for, worked out once.
    is_greedy: bool = field(init=False)
    has_filter: bool = field(init=False)  # top-k, top-p or min-p
    has_penalty: bool = field(init=False)
    is_plain: bool = field(init=False)  # greedy, and the model's logits are used as they are

    def __post_init__(self) -> None:
        p = self.params
        has_filter = p.top_k > 0 or p.top_p < 1 or p.min_p > 0
        has_penalty = p.repetition_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0
        touched = has_penalty or bool(p.logit_bias) or p.min_tokens > 0 or p.structured_outputs is not None
        object.__setattr__(self, "is_greedy", p.is_greedy)
        object.__setattr__(self, "has_filter", has_filter)
        object.__setattr__(self, "has_penalty", has_penalty)
        object.__setattr__(self, "is_plain", p.is_greedy and not touched)

    @classmethod
    def of(cls, request: EngineRequest, output_token_ids: Sequence[int]) -> SamplingRow:
        """The row of a request; `output_token_ids` is the list that its tokens are appended to."""
        return cls(
            params=request.params,
            seed=request.seed,
            sample_index=request.sample_index,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=output_token_ids,
            stop_ids=stop_ids(request.params, request.eos_token_ids),
        )

    @property
    def position(self) -> int:
        """Position in the sequence of the token about to be sampled."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def needs_stop_mask(self) -> bool:
        """Whether it is too early for a token that ends the sequence; a structured one's own mask knows better."""
        return len(self.output_token_ids) < self.params.min_tokens and self.params.structured_outputs is None


@dataclass(frozen=True, slots=True, eq=False)
class SamplingBatch:
    """The rows of one call of the sampler, in the order of the logits, and which of them need what."""

    rows: tuple[SamplingRow, ...]
    all_plain: bool = field(init=False)  # an argmax of the model's logits is all that is needed
    random: tuple[int, ...] = field(init=False)  # indices of the rows that are drawn
    with_logprobs: tuple[int, ...] = field(init=False)  # indices of the rows that report logprobs
    structured: tuple[int, ...] = field(init=False)  # indices of the rows that a grammar restricts

    def __post_init__(self) -> None:
        indexed = list(enumerate(self.rows))
        object.__setattr__(self, "all_plain", all(row.is_plain for row in self.rows))
        object.__setattr__(self, "random", tuple(i for i, row in indexed if not row.is_greedy))
        logprobs = tuple(i for i, row in indexed if row.params.logprobs is not None)
        object.__setattr__(self, "with_logprobs", logprobs)
        structured: tuple[int, ...] = ()
        if not self.all_plain:
            structured = tuple(i for i, row in indexed if row.params.structured_outputs is not None)
        object.__setattr__(self, "structured", structured)
