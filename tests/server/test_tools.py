"""Tool calls and reasoning over HTTP, with the official client: streamed and whole say the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from moe_runtime.errors import ConfigError
from tests.server.conftest import Served
from tests.server.fake_engine import FakeEngine, server_config

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
HERMES = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}\n</tool_call>'
)
CODER = (
    "Let me see.\n<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
)
ONE = {"type": "function", "function": {"name": "weather"}}


async def answers(served: Served, **fields: Any) -> list[dict[str, Any]]:
    """What the answer says, whole and streamed: content, reasoning, calls, finish reason."""
    client = served.openai()
    body: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Ulm?"}], **fields}
    whole: Any = (await client.chat.completions.create(**body)).choices[0]
    folded: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "finish": None}
    async for chunk in await client.chat.completions.create(**body, stream=True):
        choice: Any = chunk.choices[0]
        folded["content"] += choice.delta.content or ""
        folded["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
        for piece in choice.delta.tool_calls or []:
            call = folded["calls"].setdefault(piece.index, ["", ""])
            call[0] += piece.function.name or ""
            call[1] += piece.function.arguments or ""
        folded["finish"] = choice.finish_reason or folded["finish"]
    folded["calls"] = [(name, json.loads(text)) for name, text in folded["calls"].values()]
    return [
        {
            "content": whole.message.content or "",
            "reasoning": getattr(whole.message, "reasoning_content", None) or "",
            "calls": [
                (call.function.name, json.loads(call.function.arguments))
                for call in whole.message.tool_calls or []
            ],
            "finish": whole.finish_reason,
        },
        folded,
    ]


@pytest.mark.parametrize(("parser", "reply"), [("hermes", HERMES), ("qwen3_coder", CODER)])
def test_calls_that_the_model_makes_by_choice(run: Callable[..., None], parser: str, reply: str) -> None:
    async def scenario() -> None:
        served = Served(
            FakeEngine(reply, max_model_len=4096), enable_auto_tool_choice=True, tool_call_parser=parser
        )
        for answer in await answers(served, tools=[WEATHER]):
            assert answer["content"].strip() == "Let me see."
            assert answer["calls"] == [("weather", {"city": "Ulm", "days": 2})]
            assert answer["finish"] == "tool_calls"
        for answer in await answers(served, tools=[WEATHER], tool_choice="none"):
            assert (answer["content"], answer["calls"], answer["finish"]) == (reply, [], "stop")

    run(scenario())


@pytest.mark.parametrize(
    ("choice", "reply", "finish"),
    [
        ("required", '[{"name": "weather", "parameters": {"city": "Ulm"}}]', "tool_calls"),
        (ONE, '{"city": "Ulm"}', "stop"),
    ],
    ids=["required", "named"],
)
def test_forced_calls_need_no_flag(run: Callable[..., None], choice: Any, reply: str, finish: str) -> None:
    async def scenario() -> None:
        served = Served(FakeEngine(reply, max_model_len=4096))
        for answer in await answers(served, tools=[WEATHER], tool_choice=choice):
            assert answer == {
                "content": "",
                "reasoning": "",
                "calls": [("weather", {"city": "Ulm"})],
                "finish": finish,
            }
        for params in served.engine.params:
            assert params.structured_outputs is not None
            assert "city" in str(params.structured_outputs.json)

    run(scenario())


def test_reasoning_is_told_from_content(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served(FakeEngine("<think>\nIt may rain.\n</think>\n\nRain."), reasoning_parser="qwen3")
        for answer in await answers(served):
            assert (answer["reasoning"], answer["content"]) == ("It may rain.", "Rain.")

    run(scenario())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"enable_auto_tool_choice": True}, "--tool-call-parser NAME go together"),
        ({"tool_call_parser": "hermes"}, "--enable-auto-tool-choice"),
        ({"tool_call_parser": "hermse", "enable_auto_tool_choice": True}, "'hermse'; did you mean 'hermes'?"),
        ({"reasoning_parser": "qwen33"}, "--reasoning-parser has no parser 'qwen33'"),
    ],
)
def test_flags_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        server_config(**settings)
