"""/tokenize of long texts: the same tokens, and refused early where they are far too long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import Served
from tests.server.fake_engine import FakeEngine


class _Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.num_chars = 0

    def encode(self, text: str, *rest: Any, **named: Any) -> list[int]:
        self.num_chars += len(text)
        return list(self._tokenizer.encode(text, *rest, **named))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _body(field: str, text: str) -> dict[str, Any]:
    return {field: text if field == "prompt" else [{"role": "user", "content": text}]}


@pytest.mark.parametrize(
    ("field", "route"), [("prompt", "/v1/completions"), ("messages", "/v1/chat/completions")]
)
def test_a_huge_text_is_refused_by_its_beginning_as_generating_does(
    run: Callable[..., None], field: str, route: str
) -> None:
    async def scenario() -> None:
        served = Served()
        counting: Any = _Counting(served.engine.tokenizer)
        served.engine.tokenizer = counting
        huge = _body(field, "the experts " * 100_000)
        refused = await served.post("/tokenize", huge)
        assert counting.num_chars < 10_000
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert refused.json() == (await served.post(route, huge)).json()

    run(scenario())


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_a_text_that_is_but_a_little_too_long_is_counted(run: Callable[..., None], field: str) -> None:
    async def scenario() -> None:
        served = Served()
        answer = await served.post("/tokenize", _body(field, "the experts " * 300))
        assert answer.json()["count"] > served.engine.max_model_len

    run(scenario())


def test_tokens_of_a_long_text_are_those_of_its_parts_put_together(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served(FakeEngine(max_model_len=8192))
        sentence = "the experts of this model, each of them: 12 \n"
        short = (await served.post("/tokenize", {"prompt": sentence})).json()["tokens"]
        long = (await served.post("/tokenize", {"prompt": sentence * 400})).json()["tokens"]
        assert long == short * 400

    run(scenario())
