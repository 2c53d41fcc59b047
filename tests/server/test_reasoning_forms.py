"""Answers that have a form after their reasoning: what the ranks are asked for, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import Served
from tests.server.fake_engine import FakeEngine
from tests.server.test_tools import CODER, ONE, WEATHER, answers

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}{{ ending }}"
ARGUMENTS = '{"city": "Ulm"}'
CALLS = [("weather", {"city": "Ulm"})]
OPENED = {"after": "</think>", "after_opening": "<think>"}
CLOSED = {"after": None, "after_opening": None}


def _served(reply: str, parser: str | None = "qwen3", **settings: Any) -> Served:
    engine = FakeEngine(reply, max_model_len=4096)
    return Served(engine, reasoning_parser=parser, chat_template=TEMPLATE, **settings)


def _ending(text: str) -> dict[str, Any]:
    return {"extra_body": {"chat_template_kwargs": {"ending": text}}}


def _asked(served: Served) -> dict[str, str | None]:
    """Where the engine's last request begins its form."""
    form = served.engine.params[-1].structured_outputs
    assert form is not None
    return {"after": form.after, "after_opening": form.after_opening}


@pytest.mark.parametrize(
    ("parser", "ending", "expected"),
    [
        ("qwen3", "", OPENED),
        ("qwen3", "<think>\n", {**OPENED, "after_opening": None}),
        ("qwen3", "<think>\n\n</think>\n\n", CLOSED),
        ("deepseek_r1", "", {**OPENED, "after_opening": None}),
        ("deepseek_r1", "<think>\n\n</think>\n\n", CLOSED),
        (None, "<think>\n", CLOSED),
    ],
)
@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": ONE},
    ],
    ids=["response_format", "required", "named"],
)
def test_the_form_begins_where_the_prompt_says(
    run: Callable[..., None],
    parser: str | None,
    ending: str,
    expected: dict[str, Any],
    fields: dict[str, Any],
) -> None:
    async def scenario() -> None:
        served = _served("{}", parser)
        await answers(served, **fields, **_ending(ending))
        assert _asked(served) == expected

    run(scenario())


@pytest.mark.parametrize(
    ("ending", "reply", "reasoning"),
    [
        ("<think>\n", "Rain?\n</think>\n\n" + ARGUMENTS, "Rain?"),
        ("", "<think>\nRain?\n</think>\n\n" + ARGUMENTS, "Rain?"),
        ("", ARGUMENTS, ""),
        ("<think>\n\n</think>\n\n", ARGUMENTS, ""),
    ],
    ids=["opened by the prompt", "opened by the model", "left out", "disabled"],
)
def test_reasoning_comes_beside_content_and_forced_calls(
    run: Callable[..., None], ending: str, reply: str, reasoning: str
) -> None:
    async def scenario() -> None:
        for answer in await answers(
            _served(reply), response_format={"type": "json_object"}, **_ending(ending)
        ):
            assert answer == {"content": ARGUMENTS, "reasoning": reasoning, "calls": [], "finish": "stop"}
        for answer in await answers(_served(reply), tools=[WEATHER], tool_choice=ONE, **_ending(ending)):
            assert answer == {"content": "", "reasoning": reasoning, "calls": CALLS, "finish": "stop"}
        array = reply.replace(ARGUMENTS, f'[{{"name": "weather", "parameters": {ARGUMENTS}}}]')
        for answer in await answers(
            _served(array), tools=[WEATHER], tool_choice="required", **_ending(ending)
        ):
            assert answer == {"content": "", "reasoning": reasoning, "calls": CALLS, "finish": "tool_calls"}

    run(scenario())


def test_where_the_form_holds_throughout_tags_are_content(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = _served("<think>a</think>b")
        fields: Any = _ending("</think>")
        fields["extra_body"]["structured_outputs"] = {"regex": ".*"}
        for answer in await answers(served, **fields):
            assert (answer["content"], answer["reasoning"]) == ("<think>a</think>b", "")

    run(scenario())


def test_a_call_that_is_thought_of_does_not_end_reasoning_before_a_form(run: Callable[..., None]) -> None:
    thought = CODER.replace("Let me see.\n", "")
    tools: dict[str, Any] = {"enable_auto_tool_choice": True, "tool_call_parser": "qwen3_coder"}

    async def scenario() -> None:
        served = _served(f"{thought}\n</think>\n{{}}", **tools)
        fields = {"tools": [WEATHER], "response_format": {"type": "json_object"}, **_ending("<think>\n")}
        for answer in await answers(served, **fields):
            assert (answer["content"], answer["reasoning"], answer["calls"]) == ("{}", thought, [])

    run(scenario())


def test_a_request_may_say_itself_where_its_form_begins(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = _served("a.b")
        fields: Any = _ending("")
        fields["extra_body"]["structured_outputs"] = {"regex": "b", "after": "."}
        await answers(served, **fields)
        assert _asked(served) == {"after": ".", "after_opening": None}
        fields["extra_body"]["structured_outputs"] = {"regex": "b", "after": ""}
        refused = await served.post(
            "/v1/chat/completions",
            {"model": "demo", "messages": [{"role": "user", "content": "a"}], **fields["extra_body"]},
        )
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "structured_outputs"

    run(scenario())


def test_the_responses_api_reasons_before_a_form_too(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = _served("Rain?\n</think>\n\n{}")
        answer = await served.post(
            "/v1/responses",
            {
                "model": "demo",
                "input": "Ulm?",
                "text": {"format": {"type": "json_object"}},
                "chat_template_kwargs": {"ending": "<think>\n"},
            },
        )
        assert answer.status_code == 200, answer.text
        thought, message = answer.json()["output"]
        assert thought["content"] == [{"type": "reasoning_text", "text": "Rain?"}]
        assert message["content"][0]["text"] == "{}"
        assert _asked(served)["after"] == "</think>"

    run(scenario())
