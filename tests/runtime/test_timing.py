"""The division of a step's time into parts: it adds up, it counts what ran, and it waits for no device."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_models.interfaces import CausalLM
from moe_runtime.delivery import Delivery
from moe_runtime.parallel.dispatch import ExpertLoad
from moe_runtime.parallel.host_link import HostLink
from moe_runtime.request import EngineRequest, SamplingParams
from moe_runtime.step_loop import StepLoop
from moe_runtime.timing.events import HostEvent
from moe_runtime.timing.layers import find_layers
from moe_runtime.timing.parts import Part
from moe_runtime.timing.timer import PartTimer
from moe_runtime.transport.mailbox import Mailbox
from moe_runtime.transport.wire import Deltas
from tests.checkpoints import make_checkpoint
from tests.models.model_harness import load_model
from tests.runtime import host_ranks
from tests.runtime.local_rank import LocalRank


class FakeClock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeEvent:
    """An event of a device that passes it at `device.finish()`, with the time at which it was recorded."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def record(self) -> None:
        self.at = self._device.clock.now
        self._device.recorded.append(self)
        self.passed = False

    def has_passed(self) -> bool:
        return self.passed

    def seconds_until(self, end: FakeEvent) -> float:
        assert self.passed
        assert end.passed
        return end.at - self.at

    def waited_until(self, end: FakeEvent) -> float:
        return 0.0


class FakeDevice:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.recorded: list[FakeEvent] = []
        self.num_made = 0

    def new_event(self) -> FakeEvent:
        self.num_made += 1
        return FakeEvent(self)

    def finish(self) -> None:
        for event in self.recorded:
            event.passed = True
        self.recorded = []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path, max_position_embeddings=4096)
    return load_model(path)


def _on_host(clock: FakeClock, interval: int = 1) -> PartTimer[HostEvent]:
    return PartTimer(interval, lambda: HostEvent(clock=clock))


def _step(timer: PartTimer[Any], clock: FakeClock, *parts: tuple[Part, float]) -> None:
    timer.start()
    for part, seconds in parts:
        timer.switch(part)
        clock.now += seconds
    timer.stop()


def test_seconds_are_counted_for_the_part_that_they_were_spent_in() -> None:
    clock = FakeClock()
    timer = _on_host(clock)
    for _ in range(2):
        _step(timer, clock, (Part.ATTENTION, 1), (Part.OTHER, 2), (Part.DISPATCH, 3), (Part.EXPERTS, 4))
    assert timer.seconds() == {
        "attention": 2,
        "linear_attention": 0,
        "experts": 8,
        "dispatch": 6,
        "combine": 0,
        "waiting": 0,
        "other": 4,
    }


def test_a_step_that_was_not_stopped_does_not_count() -> None:
    clock = FakeClock()
    timer = _on_host(clock)
    timer.start()
    timer.switch(Part.WAITING)
    clock.now += 5
    before = timer.seconds()
    _step(timer, clock, (Part.EXPERTS, 1))
    assert sum(before.values()) == 0
    assert timer.seconds()["waiting"] == 0
    assert sum(timer.seconds().values()) == 1


def test_what_a_link_waited_while_tokens_travelled_is_waiting() -> None:
    clock, waited = FakeClock(), FakeClock()
    timer = PartTimer(1, lambda: HostEvent(waited, clock))
    timer.start()
    waited.now += 7  # in the agreement, which is waiting as a whole
    for part, seconds, wait in (
        (Part.DISPATCH, 3.0, 2.0),
        (Part.EXPERTS, 1.0, 0.0),
        (Part.COMBINE, 2.0, 0.5),
    ):
        timer.switch(part)
        clock.now += seconds
        waited.now += wait
    timer.stop()
    found = timer.seconds()
    assert (found["dispatch"], found["experts"], found["combine"]) == (1.0, 1.0, 1.5)
    assert found["waiting"] == 2.5


def test_one_step_of_several_is_measured_and_stands_for_those_since_the_last() -> None:
    clock = FakeClock()
    timer = _on_host(clock, interval=4)
    seconds = []
    for _ in range(9):
        _step(timer, clock, (Part.EXPERTS, 1.0))
        seconds.append(timer.seconds()["experts"])
    assert seconds == [1, 1, 1, 1, 5, 5, 5, 5, 9]


def test_events_of_a_device_are_read_when_it_has_passed_them_and_used_again() -> None:
    device = FakeDevice()
    timer = PartTimer(4, device.new_event)
    counts = []
    for _ in range(9):
        _step(timer, device.clock, (Part.EXPERTS, 1.0), (Part.COMBINE, 0.5))
        counts.append(len(device.recorded))
        device.finish()
    timer.start()  # reads the ninth
    assert counts == [4, 0, 0, 0, 4, 0, 0, 0, 4]
    assert timer.seconds()["experts"] == pytest.approx(9.0)
    assert timer.seconds()["combine"] == pytest.approx(4.5)
    assert device.num_made == 4


def test_a_device_that_lags_behind_is_not_waited_for_and_no_step_is_forgotten() -> None:
    device = FakeDevice()
    timer = PartTimer(2, device.new_event)
    for _ in range(5):
        _step(timer, device.clock, (Part.EXPERTS, 1.0))
    assert sum(timer.seconds().values()) == 0
    device.finish()
    _step(timer, device.clock, (Part.EXPERTS, 1.0))  # reads the first, and is measured for the five since
    assert timer.seconds()["experts"] == pytest.approx(1.0)
    device.finish()
    timer.start()
    assert timer.seconds()["experts"] == pytest.approx(6.0)


def test_layers_have_hooks_in_measured_steps_only(model: CausalLM) -> None:
    timer = _on_host(FakeClock(), interval=2)
    timer.watch(model)
    layers = [layer for layer, _ in find_layers(model)]
    hooked = []
    for _ in range(4):
        timer.start()
        hooked.append({bool(layer._forward_hooks) for layer in layers})
        timer.stop()
    assert hooked == [{True}, {False}, {True}, {False}]


def test_every_mixer_is_found_and_nothing_else(model: CausalLM) -> None:
    names = {module: name for name, module in model.named_modules()}
    expected = {
        f"layers.{index}.mixer": Part.ATTENTION if kind == "full_attention" else Part.LINEAR_ATTENTION
        for index, kind in enumerate(model.config.layer_types)  # type: ignore[union-attr,arg-type]
    }
    assert {names[module]: part for module, part in find_layers(model)} == expected
    assert set(expected.values()) == {Part.ATTENTION, Part.LINEAR_ATTENTION}


def test_a_model_of_another_kind_has_no_layers_to_watch() -> None:
    linear = nn.Linear(1, 1)
    timer = _on_host(FakeClock())
    timer.watch(linear)
    timer.start()
    assert not linear._forward_hooks


class _Server:
    """Takes what is delivered; has the loop stop once `num_requests` have ended."""

    def __init__(self, mailbox: Mailbox, num_requests: int) -> None:
        self._mailbox = mailbox
        self._num_open = num_requests
        self.tokens = 0

    def deliver(self, driver: str, message: Deltas) -> None:
        for delta in message.all():
            self.tokens += len(delta.new_token_ids)
            self._num_open -= delta.finish_reason is not None
        if not self._num_open:
            self._mailbox.stop()

    def forget(self, request_ids: object) -> None:
        pass

    def wake_peers(self, generation: int, agreement: int) -> None:
        pass


def test_the_parts_of_a_real_ranks_steps_add_up_and_its_counters_count(model: CausalLM) -> None:
    rank, mailbox, timer = LocalRank(model), Mailbox(0), PartTimer(1, HostEvent)
    timer.watch(model)
    config = model.config
    num_sparse = len(config.sparse_layers)  # type: ignore[union-attr,arg-type]
    load = ExpertLoad(num_sparse, config.num_experts, torch.device("cpu"))  # type: ignore[union-attr,arg-type]
    requests = [
        EngineRequest(
            request_id=str(number),
            sample_index=0,
            prompt_token_ids=tuple(range(1, 21 + number)),
            params=SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
            seed=0,
        )
        for number in range(3)
    ]
    mailbox.submit("driver", requests)
    server = _Server(mailbox, len(requests))
    loop = StepLoop(
        scheduler=rank.scheduler,
        runner=rank.runner,
        delivery=Delivery(None),
        mailbox=mailbox,
        server=server,  # type: ignore[arg-type]
        agree=lambda values: [values],
        dispatcher_for_step=lambda counts: load.watch(rank.dispatcher),
        timer=timer,
        generation=0,
    )
    began = time.perf_counter()
    loop.run()
    wall_s = time.perf_counter() - began

    parts = timer.seconds()
    assert loop.stats.run_s <= sum(parts.values()) <= wall_s
    assert all(seconds > 0 for seconds in parts.values())
    assert parts["attention"] + parts["linear_attention"] + parts["experts"] < loop.stats.run_s
    assert server.tokens == loop.stats.generation_tokens == 18
    assert sum(loop.step_sizes) == loop.stats.steps == 6
    assert loop.step_sizes[2] == 5  # the decodes, of three tokens
    assert (loop.stats.decode_steps, loop.stats.decode_tokens) == (5, 15)
    of_prompts = timer.prompt_seconds()
    assert all(0 < of_prompts[part] < seconds for part, seconds in parts.items())
    computed = loop.stats.prompt_tokens + 18 - 3  # the last token of each is not computed
    top_k = config.num_experts_per_tok  # type: ignore[union-attr]
    assert load.tokens_per_expert().sum(1).tolist() == [computed * top_k] * num_sparse


def _wait_for_the_late(link: HostLink) -> list[float]:
    """Rank 1 comes late to each agreement."""
    before = link.waited_s()
    for _ in range(3):
        if link.rank == 1:
            time.sleep(0.05)
        link.agree([link.rank])
    return [before, link.waited_s()]


def test_a_link_knows_how_long_it_waited(tmp_path: Path) -> None:
    (before, after), _ = host_ranks.run(_wait_for_the_late, 2, tmp_path)
    assert after > before >= 0
