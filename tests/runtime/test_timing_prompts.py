"""Steps in which some rank computes prompts are timed apart, beside all steps together."""

from __future__ import annotations

from moe_runtime.timing.events import HostEvent
from moe_runtime.timing.parts import Part
from moe_runtime.timing.timer import PartTimer


def test_steps_with_prompts_are_counted_apart_as_well() -> None:
    now = [100.0]
    timer = PartTimer(16, lambda: HostEvent(clock=lambda: now[0]))
    timer.measure_one_of(1)
    for seconds, has_prompts in ((1.0, True), (2.0, False), (4.0, True)):
        timer.start()
        timer.switch(Part.EXPERTS)
        now[0] += seconds
        timer.stop(has_prompts)
    assert timer.seconds()["experts"] == 7
    assert timer.prompt_seconds() == {**timer.seconds(), "experts": 5}
