"""Progress bars: ranks starting up, requests being served."""

from __future__ import annotations

import os
from types import TracebackType

from tqdm import tqdm

from moe_runtime.modelfiles import ModelFiles
from moe_runtime.rank_spec import StartUpStep
from moe_runtime.request import OutputDelta, RequestOutput


class StartUpProgress:
    """What the ranks do before they can serve: a bar for each phase, shown once it begins."""

    def __init__(self, files: ModelFiles, *, disable: bool) -> None:
        self._disable = disable
        # Tensors that every rank holds are read once a rank, so the total is a lower bound until the end.
        self._file_bytes = sum(os.path.getsize(file) for file in files.weight_files())
        self._bars: dict[str, tqdm] = {}

    def __enter__(self) -> StartUpProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in self._bars.values():
            bar.close()

    def update(self, step: StartUpStep) -> None:
        """Count what some rank has done; a phase in which there is nothing to do has no bar."""
        if step.total == 0:
            return
        bar = self._bars[step.phase] if step.phase in self._bars else self._open(step)
        bar.total = max(bar.total or 0, bar.n + step.amount)
        bar.update(step.amount)

    def _open(self, step: StartUpStep) -> tqdm:
        options = {"disable": self._disable, "leave": False}
        if step.phase == "load":
            bar = tqdm(total=self._file_bytes, unit="B", unit_scale=True, desc="Loading weights", **options)
        else:
            bar = tqdm(total=step.total, unit="batch", desc="Compiling kernels", **options)
        self._bars[step.phase] = bar
        return bar


class RequestProgress:
    """Requests finished, with prompt and output tokens per second."""

    def __init__(self, *, disable: bool) -> None:
        self._prompt_tokens = 0
        self._output_tokens = 0
        self._bar = tqdm(unit="request", desc="Generating", disable=disable)

    def __enter__(self) -> RequestProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

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
