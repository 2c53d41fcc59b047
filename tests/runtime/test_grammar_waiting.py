"""Grammars beside the step loop: what waits, what is kept, and what takes too long and fails alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.grammar.cache import GrammarCache
from moe_runtime.grammar.gate import GrammarGate
from moe_runtime.grammar.masks import MaskFiller
from moe_runtime.request import EngineRequest, SamplingParams, StructuredOutputsParams
from moe_runtime.transport.mailbox import Submitted

WAIT_S = 30.0  # only a failure takes this long


class _Grammar:
    """Stands where a compiled grammar stands."""

    memory_size_bytes = 100


class _Compiler:
    """Compiles when it is let to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.compiled: list[str] = []

    def compile(self, params: StructuredOutputsParams) -> _Grammar:
        regex = params.regex or ""
        if regex.startswith("slow"):
            assert self.go.wait(WAIT_S)
        if regex == "bad":
            raise ConfigError("structured_outputs.regex is refused: bad")
        if regex == "broken":
            raise KeyError("inside of the library")
        self.compiled.append(regex)
        return _Grammar()


@pytest.fixture
def compiler() -> Iterator[_Compiler]:
    made = _Compiler()
    yield made
    made.go.set()


def _cache(compiler: _Compiler, **limits: Any) -> GrammarCache:
    return GrammarCache(lambda: compiler, **limits)  # type: ignore[arg-type,return-value]


def _regex(text: str) -> StructuredOutputsParams:
    return StructuredOutputsParams(regex=text)


def test_equal_grammars_are_compiled_once(compiler: _Compiler) -> None:
    cache = _cache(compiler)
    first, second = cache.get(_regex("a")), cache.get(_regex("a"))
    assert first is second
    assert isinstance(first.result(WAIT_S), _Grammar)
    assert compiler.compiled == ["a"]


def test_the_least_used_grammars_are_forgotten(compiler: _Compiler) -> None:
    cache = _cache(compiler, max_bytes=250)
    for text in ("a", "b", "a", "c"):
        cache.get(_regex(text)).result(WAIT_S)
    cache.get(_regex("bad")).exception(WAIT_S)  # one worker: it begins when the one before is put away
    assert cache.num_bytes == 200
    cache.get(_regex("a")).result(WAIT_S)
    cache.get(_regex("b")).result(WAIT_S)
    assert compiler.compiled == ["a", "b", "c", "b"]


@pytest.mark.parametrize(("text", "words"), [("bad", "is refused: bad"), ("broken", "could not be compiled")])
def test_a_grammar_that_fails_is_not_kept(compiler: _Compiler, text: str, words: str) -> None:
    cache = _cache(compiler)
    first = cache.get(_regex(text))
    with pytest.raises(ConfigError, match=words):
        first.result(WAIT_S)
    assert cache.get(_regex(text)) is not first


def test_a_grammar_that_takes_too_long_is_given_up_and_others_go_on(compiler: _Compiler) -> None:
    cache = _cache(compiler, time_limit_s=0.05)
    slow = cache.get(_regex("slow"))
    with pytest.raises(ConfigError, match=r"structured_outputs.regex took more than 0.05 s to compile"):
        slow.result(WAIT_S)
    assert isinstance(cache.get(_regex("a")).result(WAIT_S), _Grammar)


# --------------------------------------------------------------------------- the gate


class _Loop:
    """Stands where the step loop stands: calls come in from threads and are made when it says so."""

    def __init__(self, cache: GrammarCache) -> None:
        self.came = threading.Semaphore(0)
        self.calls: list[Callable[[], None]] = []
        self.ready: list[tuple[str, str, int, str]] = []
        self.gate = GrammarGate(cache, self._call_soon, self._on_ready)

    def _call_soon(self, call: Callable[[], None]) -> None:
        self.calls.append(call)
        self.came.release()

    def _on_ready(self, submitted: Submitted, outcome: Any) -> None:
        driver, request, _ = submitted
        self.ready.append((driver, request.request_id, request.sample_index, type(outcome).__name__))

    def enter(self, name: str, regex: str, sample: int = 0) -> None:
        params = SamplingParams(structured_outputs=_regex(regex))
        request = EngineRequest(
            request_id=name, sample_index=sample, prompt_token_ids=(1,), params=params, seed=1
        )
        self.gate.enter(Submitted("driver", request, at=0.0))

    def take_calls(self, count: int) -> None:
        for _ in range(count):
            assert self.came.acquire(timeout=WAIT_S)
        calls, self.calls = self.calls, []
        for call in calls:
            call()


def test_requests_wait_at_the_gate_and_those_whose_grammar_is_there_pass_at_once(compiler: _Compiler) -> None:
    cache = _cache(compiler)
    cache.get(_regex("a")).result(WAIT_S)
    loop = _Loop(cache)
    loop.enter("slow", "slow")
    loop.enter("slow", "slow", sample=1)
    loop.enter("quick", "a")
    assert loop.ready == [("driver", "quick", 0, "_Grammar")]
    assert loop.gate.num_waiting == 2
    compiler.go.set()
    loop.take_calls(2)
    assert loop.ready[1:] == [("driver", "slow", 0, "_Grammar"), ("driver", "slow", 1, "_Grammar")]
    assert loop.gate.num_waiting == 0


def test_a_refusal_passes_the_gate_too(compiler: _Compiler) -> None:
    loop = _Loop(_cache(compiler))
    loop.enter("bad", "bad")
    loop.take_calls(1 if not loop.ready else 0)
    assert loop.ready == [("driver", "bad", 0, "ConfigError")]


def test_what_is_aborted_at_the_gate_never_passes_it(compiler: _Compiler) -> None:
    loop = _Loop(_cache(compiler))
    loop.enter("a", "slow")
    loop.enter("a", "slow", sample=1)
    loop.enter("b", "slow")
    assert [(driver, r.sample_index) for driver, r, _ in loop.gate.abort("a")] == [
        ("driver", 0),
        ("driver", 1),
    ]
    assert loop.gate.abort("a") == loop.gate.abort("unknown") == []
    compiler.go.set()
    loop.take_calls(3)
    assert loop.ready == [("driver", "b", 0, "_Grammar")]


# --------------------------------------------------------------------------- masks


class _Matcher:
    """Fills its mask with a number, fails, or waits to be let."""

    def __init__(self, value: int | Exception, go: threading.Event | None = None) -> None:
        self._value = value
        self._go = go

    def fill(self, allowed_W: np.ndarray) -> None:
        if self._go is not None:
            self._go.wait(WAIT_S)
        if isinstance(self._value, Exception):
            raise self._value
        allowed_W[:] = self._value


@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize("count", [1, 5])
def test_each_matcher_fills_its_own_row(num_threads: int, count: int) -> None:
    filler = MaskFiller(65, num_threads=num_threads, on_gpu=False)
    for _ in range(3):
        masks_SW, failed = filler.start([_Matcher(i + 1) for i in range(count)]).join()  # type: ignore[misc]
        assert failed == {}
        assert masks_SW.tolist() == [[i + 1] * 3 for i in range(count)]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_matchers_that_fail_or_take_too_long_fail_alone(num_threads: int) -> None:
    go = threading.Event()
    filler = MaskFiller(32, num_threads=num_threads, on_gpu=False, time_limit_s=0.05)
    matchers = [
        _Matcher(1),
        _Matcher(MoeRuntimeError("not allowed")),
        _Matcher(3, go),
        _Matcher(4),
        _Matcher(KeyError("x")),
        _Matcher(6, go),
        _Matcher(7),
    ]
    masks_SW, failed = filler.start(matchers).join()  # type: ignore[arg-type]
    assert {row: type(error) for row, error in failed.items()} == {
        1: MoeRuntimeError,
        2: ConfigError,
        4: MoeRuntimeError,
        5: ConfigError,
    }
    assert "took more than 0.05 s to find the next token's mask" in str(failed[2])
    assert [masks_SW[row].item() for row in (0, 3, 6)] == [1, 4, 7]
    again, failed = filler.start([_Matcher(9)]).join()  # type: ignore[list-item]
    assert (again.tolist(), failed) == ([[9]], {})
    go.set()
