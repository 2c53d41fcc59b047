"""The step loop and requests whose grammars are not there yet: what is aborted, refused and let through."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest

from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.cache.slots import SlotAllocator
from moe_runtime.delivery import Delivery
from moe_runtime.errors import ConfigError
from moe_runtime.grammar.cache import GrammarCache
from moe_runtime.request import EngineRequest, SamplingParams, StructuredOutputsParams
from moe_runtime.runner import StepResult
from moe_runtime.scheduler import ScheduledStep, Scheduler, SchedulerConfig
from moe_runtime.step_loop import StepLoop
from moe_runtime.timing.timer import PartTimer
from moe_runtime.transport.mailbox import Mailbox
from moe_runtime.transport.wire import Deltas, Refused
from tests.runtime.structured_rank import EOS, compiled

WAIT_S = 30.0  # only a failure takes this long
SLOW = StructuredOutputsParams(regex="slow")


class _Server:
    """Stands where the rank's server stands; what it is told can be waited for."""

    def __init__(self) -> None:
        self.said: SimpleQueue[tuple[str, Any]] = SimpleQueue()

    def deliver(self, driver: str, message: Deltas) -> None:
        for delta in message.all():
            self.said.put((delta.request_id, delta.finish_reason))

    def refuse(self, driver: str, refused: Refused) -> None:
        self.said.put((refused.request_id, refused.error))

    def forget(self, request_ids: Any) -> None:
        for request_id in request_ids:
            self.said.put((request_id, "forgotten"))

    def wake_peers(self, generation: int, agreement: int) -> None: ...


class _Runner:
    """Every token is an end of text; requests named "doomed" fail."""

    def run(self, step: ScheduledStep, dispatcher: object) -> StepResult:
        failed = {s: ConfigError("stuck") for s in step.sampled if s.request.request_id == "doomed"}
        return StepResult([EOS[0]] * len(step.sampled), [None] * len(step.sampled), {}, failed)  # type: ignore[arg-type]


class _Compiler:
    def __init__(self) -> None:
        self.go = threading.Event()

    def compile(self, params: StructuredOutputsParams) -> Any:
        if params == SLOW:
            assert self.go.wait(WAIT_S)
        return compiled(params)


class _Rank:
    def __init__(self, with_grammars: bool = True) -> None:
        self.server, self.mailbox, self.compiler = _Server(), Mailbox(0), _Compiler()
        config = SchedulerConfig(
            max_num_seqs=4, max_num_batched_tokens=64, block_size=16, max_model_len=64, max_waiting=2
        )
        loop = StepLoop(
            scheduler=Scheduler(config, BlockAllocator(20, 16), SlotAllocator(5)),
            runner=_Runner(),  # type: ignore[arg-type]
            delivery=Delivery(None),
            mailbox=self.mailbox,
            server=self.server,  # type: ignore[arg-type]
            agree=lambda values: [values],
            dispatcher_for_step=lambda counts: None,  # type: ignore[arg-type,return-value]
            timer=PartTimer.on_host(None),
            generation=0,
            grammars=GrammarCache(lambda: self.compiler) if with_grammars else None,  # type: ignore[arg-type,return-value]
        )
        self.thread = threading.Thread(target=loop.run, daemon=True)
        self.thread.start()

    def submit(self, name: str, structured: StructuredOutputsParams | None, samples: int = 1) -> None:
        requests = [
            EngineRequest(
                request_id=name,
                sample_index=index,
                prompt_token_ids=(5,),
                params=SamplingParams(structured_outputs=structured),
                seed=1,
                eos_token_ids=EOS,
            )
            for index in range(samples)
        ]
        self.mailbox.submit("driver", requests)

    def expect(self, *said: tuple[str, str]) -> None:
        """These things are said next, in any order."""
        assert sorted(self.server.said.get(timeout=WAIT_S) for _ in said) == sorted(said)


@pytest.fixture
def rank() -> Iterator[_Rank]:
    made = _Rank()
    yield made
    made.compiler.go.set()
    made.mailbox.stop()
    made.thread.join(WAIT_S)
    assert not made.thread.is_alive()


def test_other_requests_go_on_while_a_grammar_is_compiled(rank: _Rank) -> None:
    rank.submit("waits", SLOW)
    rank.submit("free", None)
    rank.expect(("free", "stop"), ("free", "forgotten"))
    rank.compiler.go.set()
    rank.expect(("waits", "stop"), ("waits", "forgotten"))


def test_a_request_that_waits_for_its_grammar_can_be_aborted(rank: _Rank) -> None:
    rank.submit("gone", SLOW, samples=2)
    rank.submit("free", None)
    rank.expect(("free", "stop"), ("free", "forgotten"))
    rank.mailbox.abort(["gone"])
    rank.expect(*[("gone", "abort"), ("gone", "forgotten")] * 2)
    rank.compiler.go.set()
    rank.submit("next", SLOW)
    rank.expect(("next", "stop"), ("next", "forgotten"))


def test_requests_that_wait_for_their_grammars_count_in_the_queue(rank: _Rank) -> None:
    for name in ("first", "second", "third"):
        rank.submit(name, SLOW)
    rank.expect(("third", "QueueFullError"))
    rank.compiler.go.set()
    rank.expect(*[(name, what) for name in ("first", "second") for what in ("stop", "forgotten")])


def test_samples_that_fail_are_refused_and_forgotten_and_others_go_on(rank: _Rank) -> None:
    rank.submit("doomed", StructuredOutputsParams(regex="a"), samples=2)
    rank.expect(*[("doomed", "ConfigError")] * 2, ("doomed", "forgotten"))
    rank.submit("free", None)
    rank.expect(("free", "stop"), ("free", "forgotten"))


def test_a_rank_without_a_tokenizer_refuses() -> None:
    rank = _Rank(with_grammars=False)
    rank.submit("structured", SLOW)
    rank.expect(("structured", "ConfigError"))
    rank.mailbox.stop()
    rank.thread.join(WAIT_S)
