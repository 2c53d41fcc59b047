"""/v1/responses: items in and out, whole and as events, for the official client and byte by byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from moe_runtime.errors import RankFailedError
from tests.server.conftest import Served
from tests.server.fake_engine import REPLY, FakeEngine

ROUTE = "/v1/responses"
THOUGHTFUL = """<think>
the experts know
</think>

each of them
<tool_call>
{"name": "find", "arguments": {"what": "a little"}}
</tool_call>
<tool_call>
{"name": "find", "arguments": {"what": "of this"}}
</tool_call>"""
PARSERS = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
ADD: dict[str, Any] = {
    "type": "function",
    "name": "find",
    "description": "Find it.",
    "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
    "strict": False,
}


def _thoughtful() -> Served:
    return Served(FakeEngine(THOUGHTFUL, max_model_len=4096), **PARSERS)


def _events(raw: bytes) -> list[dict[str, Any]]:
    """Events of a stream whose every byte is accounted for."""
    *blocks, rest = raw.split(b"\n\n")
    assert rest == b""
    events = []
    for block in blocks:
        name, data = block.split(b"\n")
        body = json.loads(data.removeprefix(b"data: "))
        assert name == b"event: " + body["type"].encode()
        assert data.startswith(b"data: {")
        events.append(body)
    return events


def _names(events: list[dict[str, Any]]) -> list[str]:
    """Kinds of events in their order, with deltas that follow each other as one."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for n, name in enumerate(names) if not n or name != names[n - 1]]


def _without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]


def test_the_official_client_gets_the_same_whole_and_streamed(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served()
        served.engine.num_cached = [3]
        client = served.openai()
        request: Any = {
            "model": "demo",
            "input": "Hello",
            "instructions": "Be brief.",
            "metadata": {"a": "b"},
        }
        whole = await client.responses.create(**request)
        events = [event async for event in await client.responses.create(**request, stream=True)]
        final: Any = events[-1]

        assert (whole.object, whole.status, whole.error) == ("response", "completed", None)
        assert (whole.output_text, final.response.output_text) == (REPLY, REPLY)
        assert (whole.metadata, whole.instructions, whole.store) == ({"a": "b"}, "Be brief.", False)
        assert (whole.temperature, whole.tool_choice, whole.parallel_tool_calls) == (0.7, "auto", True)
        assert whole.usage is not None
        assert whole.usage == final.response.usage
        assert whole.usage.input_tokens_details.cached_tokens == 3
        assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == REPLY

    run(scenario())


def test_the_clients_own_accumulator_follows_a_stream(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        client = _thoughtful().openai()
        async with client.responses.stream(model="demo", input="Hi", tools=[ADD]) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_response()
        assert [item.type for item in final.output] == [
            "reasoning",
            "message",
            "function_call",
            "function_call",
        ]
        assert final.output_text.strip() == "each of them"

    run(scenario())


def test_every_byte_of_a_stream_is_framed_and_its_events_are_in_order(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        response = await Served().post(ROUTE, {"input": "a", "stream": True, "max_output_tokens": 5})
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert b"\r" not in response.content
        events = _events(response.content)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert _names(events) == [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "incomplete",
        ]
        first, last = events[0]["response"], events[-1]["response"]
        assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
        assert (last["status"], last["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert events[2]["item"]["content"] == []
        assert last["output"] == [events[-2]["item"]]
        assert last["output"][0]["status"] == "incomplete"
        assert last["output"][0]["content"][0]["text"] == "".join(e["delta"] for e in events[4:-4])
        assert first["id"] == last["id"]
        assert {event["item_id"] for event in events[3:-2]} == {events[2]["item"]["id"]}

    run(scenario())


def test_reasoning_text_and_calls_are_items_of_their_own(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = _thoughtful()
        body = {"input": "a", "tools": [ADD]}
        whole = (await served.post(ROUTE, body)).json()
        events = _events((await served.post(ROUTE, {**body, "stream": True})).content)
        thought, message, *calls = whole["output"]

        assert _without_ids(events[-1]["response"]["output"]) == _without_ids(whole["output"])
        assert thought["content"] == [{"type": "reasoning_text", "text": "the experts know"}]
        assert message["content"][0]["text"].strip() == "each of them"
        assert [(c["name"], json.loads(c["arguments"])) for c in calls] == [
            ("find", {"what": "a little"}),
            ("find", {"what": "of this"}),
        ]
        assert len({c["call_id"] for c in calls}) == 2
        assert {item["status"] for item in whole["output"]} == {"completed"}
        assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == len(
            served.engine.tokenizer.encode("the experts know", False)
        )
        assert _names(events) == [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "reasoning_text.delta",
            "reasoning_text.done",
            "content_part.done",
            "output_item.done",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            *[
                "output_item.added",
                "function_call_arguments.delta",
                "function_call_arguments.done",
                "output_item.done",
            ]
            * 2,
            "completed",
        ]
        for event in events:
            if "output_index" in event and "item_id" in event:
                assert event["item_id"] == events[-1]["response"]["output"][event["output_index"]]["id"]

    run(scenario())


def _prompt(served: Served, **body: Any) -> Any:
    async def prompt() -> str:
        prompts: list[Any] = []
        stream = served.engine.stream

        def recorded(prompt: Any, *args: Any, **kwargs: Any) -> Any:
            prompts.append(prompt["prompt_token_ids"])
            return stream(prompt, *args, **kwargs)

        served.engine.stream = recorded  # type: ignore[method-assign]
        response = await served.post(ROUTE, {**body, "max_output_tokens": 1})
        assert response.status_code == 200, response.text
        return served.engine.tokenizer.decode(prompts[0], skip_special_tokens=False)

    return prompt()


CALL = {"type": "function_call", "call_id": "c1", "name": "find", "arguments": '{"what": "it"}'}


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({"input": "hi"}, [("user", "hi")]),
        ({"input": "hi", "instructions": "brief"}, [("system", "brief"), ("user", "hi")]),
        (
            {
                "input": [{"role": "developer", "content": "dev"}, {"role": "user", "content": "hi"}],
                "instructions": "x",
            },
            [("system", "x\n\ndev"), ("user", "hi")],
        ),
        (
            {
                "input": [
                    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
                    {
                        "id": "msg_1",
                        "type": "message",
                        "role": "assistant",
                        "status": "completed",
                        "content": [{"type": "output_text", "text": "b", "annotations": []}],
                    },
                    {"role": "user", "content": "c"},
                ]
            },
            [("user", "a"), ("assistant", "b"), ("user", "c")],
        ),
        (
            {
                "input": [
                    {"role": "user", "content": "a"},
                    {
                        "type": "reasoning",
                        "summary": [],
                        "content": [{"type": "reasoning_text", "text": "hm"}],
                    },
                    {"role": "assistant", "content": "b"},
                    CALL,
                    CALL,
                    {"type": "function_call_output", "call_id": "c1", "output": "found"},
                ]
            },
            [("user", "a"), ("assistant", "b", 2), ("tool", "found")],
        ),
    ],
)
def test_items_become_the_conversation_that_a_chat_would_send(
    run: Callable[..., None], body: dict[str, Any], messages: list[Any]
) -> None:
    async def scenario() -> None:
        served = Served()
        call = {"id": "c1", "function": {"name": "find", "arguments": {"what": "it"}}}
        wanted = [
            {"role": role, "content": text, "tool_calls": [call] * calls[0] if calls else []}
            for role, text, *calls in messages
        ]
        assert await _prompt(served, **body) == served.engine.tokenizer.apply_chat_template(wanted)

    run(scenario())


def test_tools_reach_the_template_in_the_shape_of_a_chat(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = _thoughtful()
        nested = {"type": "function", "function": {k: v for k, v in ADD.items() if k != "type"}}
        wanted = served.engine.tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], tools=[nested]
        )
        assert await _prompt(served, input="a", tools=[ADD]) == wanted

    run(scenario())


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "input is missing"),
        ({"input": []}, "input", "at least one item"),
        ({"input": ["a"]}, "input", "str at index 0"),
        ({"input": 5}, "input", "a string or a list of items, got int"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "keeps no items"),
        ({"input": [{"type": "mesage"}]}, "input[0].type", "did you mean 'message'"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role", "must be one of user"),
        ({"input": [{"role": "user"}]}, "input[0].content", "is missing"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
            "text only",
        ),
        ({"input": [{**CALL, "call_id": None}]}, "input[0].call_id", "must be a string"),
        ({"input": [{**CALL, "arguments": "{"}]}, "input[0].arguments", "JSON object"),
        ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output", "is missing"),
        (
            {"input": [{"type": "reasoning", "encrypted_content": "x"}]},
            "input[0].encrypted_content",
            "another",
        ),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id", "keeps no answers"),
        ({"input": "a", "background": True}, "background", "use stream"),
        ({"input": "a", "truncation": "auto"}, "truncation", "shorten the input"),
        ({"input": "a", "max_tokens": 5}, "max_tokens", "use max_output_tokens"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"input": "a", "max_output_tokens": 1000}, "input", "context length is 256"),
        ({"input": "a", "temperature": -1}, "temperature", "at least 0"),
        ({"input": "a", "reasoning": {"effort": "high"}}, "reasoning.effort", "chat_template_kwargs"),
        ({"input": "a", "reasoning": {"efort": "low"}}, "reasoning.efort", "did you mean 'effort'"),
        ({"input": "a", "text": {"verbosity": "low"}}, "text.verbosity", "in instructions"),
        ({"input": "a", "text": {"format": {"type": "xml"}}}, "text.format.type", "json_object"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.schema", "JSON schema"),
        (
            {"input": "a", "text": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}},
            "text.format",
            "nothing",
        ),
        ({"input": "a", "include": ["everything"]}, "include[0]", "must be one of"),
        ({"input": "a", "top_logprobs": 2}, "top_logprobs", "needs include"),
        ({"input": "a", "n": 2}, "n", "one answer"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type", "other tools are not run"),
        (
            {"input": "a", "tools": [ADD], "tool_choice": {"type": "function", "name": "fnd"}},
            "tool_choice.name",
            "'find'",
        ),
        ({"input": "a", "tool_choice": 5}, "tool_choice", "must be one of"),
        ({"input": "a", "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"input": "a", "stream_options": {}}, "stream_options", "needs stream"),
    ],
)
def test_a_bad_field_is_named(run: Callable[..., None], body: Any, param: str, words: str) -> None:
    async def scenario() -> None:
        response = await Served(**PARSERS).post(ROUTE, body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param)
        assert words in error["message"]

    run(scenario())


def test_fields_reach_the_engine(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served()
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        client = served.openai()
        await client.responses.create(
            model="demo",
            input="a",
            temperature=0.5,
            top_p=0.9,
            max_output_tokens=7,
            store=True,
            truncation="disabled",
            reasoning={"effort": "medium", "summary": "auto"},
            text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}},
            extra_body={"top_k": 3, "seed": 5, "stop": "END", "min_p": 0.1, "priority": 2},
        )
        (params,) = served.engine.params
        assert (params.temperature, params.top_p, params.max_tokens, params.top_k) == (0.5, 0.9, 7, 3)
        assert (params.seed, params.stop, params.min_p, served.engine.priorities) == (5, ("END",), 0.1, [2])
        assert params.structured_outputs is not None
        assert json.loads(str(params.structured_outputs.json)) == schema

    run(scenario())


def test_logprobs_are_given_where_they_are_asked_for(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        client = Served().openai()
        request: Any = {
            "model": "demo",
            "input": "a",
            "max_output_tokens": 6,
            "top_logprobs": 2,
            "include": ["message.output_text.logprobs"],
        }
        whole: Any = await client.responses.create(**request)
        streamed: list[Any] = []
        async for event in await client.responses.create(**request, stream=True):
            if event.type == "response.output_text.delta":
                streamed += event.logprobs
        logprobs = whole.output[0].content[0].logprobs
        assert "".join(entry.token for entry in logprobs) == whole.output_text
        assert [entry.token for entry in logprobs] == [entry.token for entry in streamed]
        assert [len(entry.top_logprobs) for entry in logprobs] == [2] * 6

    run(scenario())


def test_an_error_in_mid_stream_is_a_failed_response(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served()
        served.engine.error_after = (3, RankFailedError("rank 1 failed. Its traceback:\nFile secret.py"))
        response = await served.post(ROUTE, {"input": "a", "stream": True})
        last = _events(response.content)[-1]
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        assert last["response"]["error"]["code"] == "server_error"
        assert "secret" not in response.text

    run(scenario())


@pytest.mark.parametrize("streamed", [True, False])
def test_an_error_before_the_first_token_has_its_status(run: Callable[..., None], streamed: bool) -> None:
    async def scenario() -> None:
        served = Served()
        served.engine.error_after = (0, RankFailedError("rank 1 failed"))
        with pytest.raises(openai.InternalServerError) as caught:
            await served.openai().responses.create(model="demo", input="a", stream=streamed)
        assert caught.value.status_code == 503

    run(scenario())
