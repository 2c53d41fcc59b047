"""Progress bars: weights being read, requests being served."""

from __future__ import annotations

import os
from types import TracebackType

from tqdm import tqdm

from moe_runtime.modelfiles import ModelFiles
from moe_runtime.request import OutputDelta, RequestOutput


class _Bar:
    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


class LoadProgress(_Bar):
    """Bytes of the checkpoint read by all ranks together."""

    def __init__(self, files: ModelFiles, *, disable: bool) -> None:
        # Tensors that every rank holds are read once a rank, so the total is a lower bound until the end.
        total = sum(os.path.getsize(file) for file in files.weight_files())
        super().__init__(
            tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=disable, leave=False)
        )

    def __enter__(self) -> LoadProgress:
        return self

    def update(self, num_bytes: int) -> None:
        """Count bytes that some rank has read."""
        self._bar.total = max(self._bar.total or 0, self._bar.n + num_bytes)
        self._bar.update(num_bytes)


class RequestProgress(_Bar):
    """Requests finished, with prompt and output tokens per second."""

    def __init__(self, *, disable: bool) -> None:
        self._prompt_tokens = 0
        self._output_tokens = 0
        super().__init__(tqdm(unit="request", desc="Generating", disable=disable))

    def __enter__(self) -> RequestProgress:
        return self

    def update(self, num_requests: int, delta: OutputDelta, finished: RequestOutput | None) -> None:
        """Count a delivered piece, and the request if it was its last; `num_requests` are there in all."""
        self._output_tokens += len(delta.new_token_ids)
        self._bar.total = num_requests
        if finished is None or self._bar.disable:
            return
        self._prompt_tokens += len(finished.prompt_token_ids)
        elapsed = max(self._bar.format_dict["elapsed"], 1e-9)
        self._bar.set_postfix_str(
            f"prompt {self._prompt_tokens / elapsed:.1f} tokens/s, output {self._output_tokens / elapsed:.1f} "
            "tokens/s",
            refresh=False,
        )
        self._bar.update()
