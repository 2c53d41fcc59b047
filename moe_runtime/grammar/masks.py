"""MaskFiller: the tokens that the structured sequences of a step may take, found while the model runs."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.grammar.matcher import TokenMatcher
from moe_runtime.grammar.workers import Workers

# A grammar that is ambiguous without bound makes each token dearer than the last; such a request must not hold the
# step of all others back for long.
TIME_LIMIT_S = 2.0


class MaskFiller:
    """Has a step's masks filled on threads of its own; matchers are shared out among them."""

    def __init__(
        self, vocab_size: int, *, num_threads: int, on_gpu: bool, time_limit_s: float = TIME_LIMIT_S
    ) -> None:
        self._num_words = -(-vocab_size // 32)
        self._workers = Workers("grammar-masks", num_threads)
        self._on_gpu = on_gpu
        self._time_limit_s = time_limit_s

    def start(self, matchers: Sequence[TokenMatcher]) -> StepMasks:
        """Begin a step's masks, one for each matcher."""
        # A thread that was given up may still write: it never shares memory with a later step.
        masks_SW = torch.zeros(len(matchers), self._num_words, dtype=torch.int32, pin_memory=self._on_gpu)
        return StepMasks(matchers, masks_SW, self._workers, self._time_limit_s)


class StepMasks:
    """The masks of one step, on their way."""

    def __init__(
        self,
        matchers: Sequence[TokenMatcher],
        masks_SW: torch.Tensor,
        workers: Workers,
        time_limit_s: float,
    ) -> None:
        self._masks_SW = masks_SW
        self._workers = workers
        self._time_limit_s = time_limit_s
        share = max(1, -(-len(matchers) // workers.num_threads))
        indexed = list(enumerate(matchers))
        self._parts = [self._begin(indexed[i : i + share]) for i in range(0, len(indexed), share)]

    def join(self) -> tuple[torch.Tensor, dict[int, MoeRuntimeError]]:
        """Wait until they are there: packed bits [S, W] on the CPU, and the errors of those that failed.

        A matcher that takes longer than the limit fails; a mask that failed is undefined.
        """
        failed: dict[int, MoeRuntimeError] = {}
        while self._parts:
            part = self._parts.pop()
            if not part.done.wait(self._time_limit_s) and (at := part.give_up()) is not None:
                self._workers.add_one()
                part.failed[part.rows[at][0]] = ConfigError(
                    f"structured_outputs took more than {self._time_limit_s:g} s to find the next token's mask; "
                    "its grammar is too ambiguous, simplify it"
                )
                if rest := part.rows[at + 1 :]:
                    self._parts.append(self._begin(rest))
            failed.update(part.failed)
        return self._masks_SW, failed

    def _begin(self, rows: list[tuple[int, TokenMatcher]]) -> _Part:
        part = _Part(rows, self._masks_SW.numpy())
        self._workers.submit(part.run)
        return part


class _Part:
    """Some rows of a step, filled one after another on one thread."""

    def __init__(self, rows: list[tuple[int, TokenMatcher]], masks_SW: np.ndarray) -> None:
        self.rows = rows
        self._masks_SW = masks_SW
        self._at = 0  # index of the row that is being filled
        self._given_up = False
        self._lock = threading.Lock()
        self.done = threading.Event()
        self.failed: dict[int, MoeRuntimeError] = {}

    def run(self) -> bool:
        for at, (row, matcher) in enumerate(self.rows):
            with self._lock:
                if self._given_up:
                    return False
                self._at = at
            try:
                matcher.fill(self._masks_SW[row])
            except MoeRuntimeError as error:
                self._fail(row, error)
            except Exception as error:
                self._fail(row, MoeRuntimeError(f"structured_outputs failed in xgrammar: {error}"))
        with self._lock:
            self.done.set()
            return not self._given_up

    def give_up(self) -> int | None:
        """Have it stop after the row that is being filled; returns that row's index, None if all are."""
        with self._lock:
            if self.done.is_set():
                return None
            self._given_up = True
            return self._at

    def _fail(self, row: int, error: MoeRuntimeError) -> None:
        with self._lock:
            if not self._given_up:
                self.failed[row] = error
