"""StructuredRank: a LocalRank of the demo checkpoint that takes structured requests, without Ray."""

from __future__ import annotations

import functools
from typing import Any

from moe_runtime.errors import MoeRuntimeError
from moe_runtime.grammar.compiler import GrammarCompiler
from moe_runtime.grammar.matcher import TokenMatcher
from moe_runtime.modelfiles import resolve_model
from moe_runtime.request import EngineRequest, SamplingParams, StructuredOutputsParams
from moe_runtime.scheduler import Sequence
from moe_runtime.tokenizer import Tokenizer, load_tokenizer
from tests.models.model_harness import load_model
from tests.runtime.local_rank import LocalRank

VOCAB = 4096
EOS = (2, 0)


@functools.cache
def demo_tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model(None))


@functools.cache
def demo_compiler() -> GrammarCompiler:
    return GrammarCompiler(demo_tokenizer(), VOCAB, EOS)


@functools.cache
def compiled(params: StructuredOutputsParams) -> Any:
    return demo_compiler().compile(params)


@functools.cache
def _demo_model() -> Any:
    return load_model(resolve_model(None).path)


class StructuredRank(LocalRank):
    """Keeps what failed apart, as the step loop does."""

    def __init__(self, **limits: Any) -> None:
        super().__init__(_demo_model(), **limits)
        self.failed: dict[Sequence, MoeRuntimeError] = {}

    def add_text(
        self,
        name: str,
        prompt: list[int],
        structured: StructuredOutputsParams | None = None,
        *,
        sample: int = 0,
        seed: int = 11,
        eos: tuple[int, ...] = EOS,
        **params: Any,
    ) -> Sequence:
        """A request that ends with an end-of-text token; greedy unless `params` say something else."""
        request = EngineRequest(
            request_id=name,
            sample_index=sample,
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(
                **{"temperature": 0, "max_tokens": 64, **params, "structured_outputs": structured}
            ),
            seed=seed,
            eos_token_ids=eos,
        )
        sequence = self.scheduler.add(request)
        if structured is not None:
            sequence.matcher = TokenMatcher(compiled(structured), request, sequence.output_ids)
        return sequence

    def step(self) -> None:
        step = self.scheduler.schedule()
        result = self.runner.run(step, self.dispatcher)
        for sequence in result.failed:
            self.scheduler.finish(sequence, "abort")
        self.failed |= result.failed
        self.scheduler.update(step, result.token_ids)


def text_of(sequence: Sequence) -> str:
    """What a sequence says; a driver sees the same."""
    return demo_tokenizer().decode(sequence.output_ids)
