"""A generation that its caller leaves early: the ranks stop it, and serve what comes next."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from moe_runtime import LLM, SamplingParams
from moe_runtime.outputs import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

PROMPTS = ["The experts of", "a", "Once there was"]
SHORT = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=6000, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(ray_session: None) -> Iterator[LLM]:
    with LLM(expert_parallel_size=2, device="cpu", dtype="float32", use_tqdm=False) as model:
        yield model


def _tokens(model: LLM) -> list[list[int]]:
    outputs = model.generate(PROMPTS, SHORT, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _interrupt_soon_after(begun: threading.Event) -> None:
    begun.wait(60)
    time.sleep(0.2)  # by then the driver waits for tokens again
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_generate_leaves_an_llm_that_serves(model: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _tokens(model)
    begun = threading.Event()
    apply = Ledger.apply

    def apply_and_tell(*args: Any) -> Any:
        begun.set()
        return apply(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "apply", apply_and_tell)
        threading.Thread(target=_interrupt_soon_after, args=(begun,)).start()
        with pytest.raises(KeyboardInterrupt):
            model.generate(PROMPTS, LONG, use_tqdm=False)
    start = time.monotonic()
    assert _tokens(model) == expected
    assert time.monotonic() - start < 15, "the ranks went on with what nobody waits for"


def test_an_abandoned_stream_is_stopped(model: LLM) -> None:
    expected = _tokens(model)
    for _ in range(3):
        for _ in model.stream(PROMPTS[0], LONG):
            break
        assert _tokens(model) == expected
