"""A rank worker whose forward pass raises on one rank, after a few steps."""

from __future__ import annotations

from collections.abc import Iterator

from moe_runtime.rank_spec import StartUpStep
from moe_runtime.worker import RankWorker

FAILING_RANK = 1


class FailingWorker(RankWorker):
    """Rank 1's third forward pass divides by zero."""

    def load(self) -> Iterator[StartUpStep]:
        yield from super().load()
        if self._spec.rank == FAILING_RANK:
            run, steps = self._runner.run, iter(range(2, -1, -1))

            def failing_run(*args: object) -> object:
                1 // next(steps)
                return run(*args)  # type: ignore[arg-type]

            self._runner.run = failing_run  # type: ignore[method-assign, assignment]
