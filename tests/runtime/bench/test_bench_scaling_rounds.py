"""`bench scaling`: rates come from rounds as they are served, the split from rounds with every step timed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from moe_runtime.bench.scaling import measure
from moe_runtime.bench.scaling.workload import Layout, ScalingWorkload
from moe_runtime.request import RequestMetrics, RequestOutput, SamplingParams

LAYOUTS = [Layout(num_ranks=1), Layout(num_ranks=2)]


class _Info:
    vocab_size = 50


class _FakeLLM:
    """Writes down what it is asked for."""

    info = _Info()
    stats = ()
    rank_1_reads: float | None = 1e10

    def __init__(self, name: str, log: list[str]) -> None:
        self._name = name
        self._log = log
        self.prompts: list[Any] = []

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        if args[0] == "measure_one_of":
            self._log.append(f"{self._name} times one of {args[1]}")
        if args[0] == "read_speed":
            self._log.append(f"{self._name} reads")
        return [3e10, self.rank_1_reads]

    def generate(self, prompts: Sequence[Any], params: SamplingParams, use_tqdm: bool) -> list[RequestOutput]:
        self._log.append(f"{self._name} generates {params.max_tokens}")
        self.prompts += prompts
        metrics = RequestMetrics(arrival_time=0.0, first_token_time=1.0)
        return [RequestOutput(request_id="0", prompt=None, prompt_token_ids=[], metrics=metrics)]


def test_steps_are_timed_in_some_rounds_and_left_alone_in_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    llms = {layout: _FakeLLM(layout.label, log) for layout in LAYOUTS}
    llms[LAYOUTS[1]].rank_1_reads = None  # as on GPUs

    @contextlib.contextmanager
    def started(self: Any, layouts: Sequence[Layout]) -> Iterator[dict[Layout, _FakeLLM]]:
        yield llms

    monkeypatch.setattr(measure._Session, "_started", started)
    monkeypatch.setattr(measure, "read_timed", lambda *_: "timed")
    monkeypatch.setattr(measure, "read_served", lambda *_: "served")
    workload = ScalingWorkload(mode="strong", concurrency=1, input_len=8, output_len=9, num_rounds=3)
    session = measure._Session(None, workload, {}, None, 16)
    session.run(LAYOUTS)
    assert log == [
        "EP=1 times one of 1",
        "EP=2 times one of 1",
        "EP=1 generates 4",  # the warm-up
        "EP=2 generates 4",
        "EP=2 generates 9",
        "EP=1 generates 9",
        "EP=1 times one of 16",
        "EP=2 times one of 16",
        *("EP=1 reads", "EP=1 generates 9"),
        *("EP=2 reads", "EP=2 generates 9"),
        *("EP=2 reads", "EP=2 generates 9"),
        *("EP=1 reads", "EP=1 generates 9"),
    ]
    assert list(session.read_speeds.values()) == [[4e10] * 2, [None] * 2]
    assert list(session.timed.values()) == [["timed"]] * 2
    assert list(session.served.values()) == [["served"] * 2] * 2
    prompts = llms[LAYOUTS[0]].prompts
    assert prompts == llms[LAYOUTS[1]].prompts
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)  # nothing is found in a cache
