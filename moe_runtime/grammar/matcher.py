"""TokenMatcher: where a structured text is in its grammar, and which tokens may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.grammar.library import load_xgrammar
from moe_runtime.request import EngineRequest


class TokenMatcher:
    """Of one sequence. Its state is that of the sequence's tokens: whatever is new among them is taken first.

    So a request that starts with tokens from before is matched from its first token on, and a preempted one
    goes on. Used by one thread at a time.
    """

    def __init__(self, grammar: Any, request: EngineRequest, output_ids: Sequence[int]) -> None:
        """
        Args:
            grammar: the xgrammar.CompiledGrammar of the request.
            output_ids: the live list of the sequence's tokens.
        """
        params = request.params
        vocab_size = grammar.tokenizer_info.vocab_size
        # A generation config may name ids that this model's head does not have.
        end_ids = [token for token in end_token_ids(request) if token < vocab_size]
        self._matcher = load_xgrammar().GrammarMatcher(grammar, override_stop_tokens=end_ids or None)
        self._output_ids = output_ids
        self._num_taken = 0
        self._min_tokens = params.min_tokens
        self._late_ids = end_ids if params.ignore_eos else []  # that come only where nothing else can
        self._stop_ids = sorted({*end_ids, *(params.stop_token_ids or ())})  # kept back by min_tokens

    def fill(self, allowed_W: np.ndarray) -> None:
        """Set the bits of the tokens that may come next, int32 [W] of 32 tokens each, the lowest bit first.

        min_tokens and ignore_eos keep back the tokens that end the text, but not where the grammar allows
        no other. Raises ConfigError if the grammar allows no token, MoeRuntimeError if not the sequence's own.
        """
        while self._num_taken < len(self._output_ids):
            token = self._output_ids[self._num_taken]
            if not self._matcher.accept_token(token):
                raise MoeRuntimeError(
                    f"structured_outputs does not allow token {token}, number {self._num_taken} of the output"
                )
            self._num_taken += 1
        self._matcher.fill_next_token_bitmask(allowed_W[None])
        if not allowed_W.any():
            raise ConfigError(
                f"structured_outputs allows no token of the vocabulary after {self._num_taken} of the output; "
                "the grammar asks for text that the vocabulary cannot spell, or for none that ends"
            )
        kept_back = self._stop_ids if self._num_taken < self._min_tokens else self._late_ids
        if kept_back:
            _keep_back(allowed_W, kept_back)


def end_token_ids(request: EngineRequest) -> tuple[int, ...]:
    """The tokens that may follow a complete text: end-of-text tokens, or else the request's own stop tokens."""
    return request.eos_token_ids or tuple(request.params.stop_token_ids or ())


def _keep_back(allowed_W: np.ndarray, token_ids: Sequence[int]) -> None:
    """Clear the bits of some tokens, unless none would be left."""
    rest_W = allowed_W.copy()
    bits = rest_W.view(np.uint32)
    for token in token_ids:
        if token < 32 * len(bits):
            bits[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
    if rest_W.any():
        allowed_W[:] = rest_W
