"""ServedEngine: what the server needs of an engine; AsyncLLM has it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from moe_runtime.rank_spec import RankReport, RankStats
from moe_runtime.request import OutputDelta, PromptInput, SamplingParams
from moe_runtime.tokenizer import Tokenizer


class ServedEngine(Protocol):
    """AsyncLLM's methods that the server calls; see there."""

    def stream(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[OutputDelta]:
        """Pieces of one prompt's completions; leaving the iteration aborts the request."""
        ...

    async def check_health(self) -> None:
        """Raises an error unless every rank answers."""
        ...

    async def stats(self) -> list[RankStats]:
        """What each rank has done and holds now."""
        ...

    @property
    def ranks(self) -> Sequence[RankReport]:
        """What each rank said of itself when it was ready."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """PromptError where the checkpoint has none."""
        ...

    @property
    def default_sampling_params(self) -> SamplingParams:
        """The checkpoint's."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and output may have together."""
        ...
