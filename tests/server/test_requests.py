"""What is asked for and how it reaches the engine: fields, their checks, and errors that name them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import Served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
NO_SUCH_TOOL = {"type": "function", "function": {"name": "wether"}}


def _user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (COMPLETIONS, {"prompt": "a", "temprature": 1}, "temprature", "did you mean 'temperature'"),
        (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature", "valid number, got 'hot'"),
        (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature", "at least 0, got -1"),
        (COMPLETIONS, {"prompt": "a", "top_p": 1.5}, "top_p", "(0, 1], got 1.5"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, "n", "at least 1, got 0"),
        (COMPLETIONS, {"prompt": "a", "n": 129}, "n", "at most 128, got 129"),
        (COMPLETIONS, {"prompt": "a", "n": 2.5}, "n", "valid integer"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": -5}, "max_tokens", "at least 1, got -5"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens", "only with echo"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs", "from 0 to 20, got 21"),
        (COMPLETIONS, {"prompt": "a", "logprobs": -1}, "logprobs", "from 0 to 20, got -1"),
        (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 10_000}, "stop", "at most 64 strings, got 10000"),
        (COMPLETIONS, {"prompt": "a", "stop": ""}, "stop", "empty string"),
        (COMPLETIONS, {"prompt": "a", "stop": [1]}, "stop[0]", "valid string, got 1"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "has key 'x'"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100, got 101"),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids", "whole numbers from 0"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "only continues text"),
        (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of", "use n"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {}}, "stream_options", "needs stream"),
        (
            COMPLETIONS,
            {"prompt": "a", "stream": True, "stream_options": {"usage": True}},
            "stream_options.usage",
            "unknown field",
        ),
        (
            COMPLETIONS,
            {"prompt": "a", "stream": True, "prompt_logprobs": 1},
            "prompt_logprobs",
            "in a stream",
        ),
        (COMPLETIONS, {"prompt": "a", "n": 2, "echo": True, "logprobs": 1}, "n", "needs n to be 1"),
        (COMPLETIONS, {}, "prompt", "prompt is missing"),
        (COMPLETIONS, {"prompt": []}, "prompt", "empty list"),
        (COMPLETIONS, {"prompt": ""}, "prompt", "prompt is empty"),
        (COMPLETIONS, {"prompt": {"text": "a"}}, "prompt", "must be a string, a list"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt", "int at index 1 among strings"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt", "str at index 1 of token ids"),
        (COMPLETIONS, {"prompt": [1, 5000]}, "prompt", "token id 5000 at index 1"),
        (COMPLETIONS, {"prompt": ["a"] * 2049}, "prompt", "at most 2048 prompts"),
        (
            COMPLETIONS,
            {"prompt": "a", "response_format": {"type": "xml"}},
            "response_format.type",
            "json_object",
        ),
        (CHAT, {}, "messages", "messages is missing"),
        (CHAT, {"messages": []}, "messages", "at least one"),
        (CHAT, {"messages": ["hi"]}, "messages[0]", "dictionary"),
        (CHAT, {"messages": [{"content": "a"}]}, "messages[0].role", "must be a string, got None"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        (CHAT, {"messages": [{"role": "wizard", "content": "a"}]}, "messages", "unknown role wizard"),
        (
            CHAT,
            _user([{"type": "image_url", "image_url": {"url": "x"}}]),
            "messages[0].content[0]",
            "text only",
        ),
        (CHAT, _user([{"type": "text"}]), "messages[0].content[0].text", "must be a string"),
        (CHAT, _user(5), "messages[0].content", "a string or a list of parts"),
        (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        (CHAT, {"messages": MESSAGES, "logprobs": 1}, "logprobs", "valid boolean"),
        (CHAT, {"messages": MESSAGES, "modalities": ["audio"]}, "modalities", "['text']"),
        (CHAT, {"messages": MESSAGES, "functions": []}, "functions", "use tools"),
        (CHAT, {"messages": MESSAGES, "tool_choice": "auto"}, "tool_choice", "needs tools"),
        (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools", "name is missing"),
        (CHAT, {"messages": MESSAGES, "tools": [TOOL]}, "tool_choice", "--enable-auto-tool-choice"),
        (
            CHAT,
            {"messages": MESSAGES, "tools": [TOOL], "tool_choice": NO_SUCH_TOOL},
            "tool_choice",
            "'wether'; did you mean 'weather'?",
        ),
        (
            CHAT,
            {
                "messages": MESSAGES,
                "tools": [TOOL],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "tool_choice",
            "nothing else can constrain",
        ),
        (
            CHAT,
            {"messages": MESSAGES, "chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs",
            "may not hold 'messages'",
        ),
        (CHAT, {"messages": MESSAGES, "continue_final_message": True}, "continue_final_message", "assistant"),
        (
            CHAT,
            {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "contradict",
        ),
        ("/tokenize", {}, "prompt", "either prompt or messages"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "greater than or equal to 0"),
        ("/v1/embeddings", {"input": "a"}, "model", "no embeddings"),
    ],
)
def test_a_bad_field_is_named(
    run: Callable[..., None], path: str, body: dict[str, Any], param: str, words: str
) -> None:
    async def scenario() -> None:
        response = await Served().post(path, body)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
        assert words in error["message"]

    run(scenario())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "body is empty"),
        (b'{"prompt": ', "not valid JSON"),
        (b"[1]", "must be a JSON object, got [1]"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "not valid JSON"),
        (b'{"prompt": ' + b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(
    run: Callable[..., None], content: bytes, words: str
) -> None:
    async def scenario() -> None:
        async with Served().client() as client:
            response = await client.post(COMPLETIONS, content=content)
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]

    run(scenario())


@pytest.mark.parametrize(
    ("path", "body", "numbers"),
    [
        (COMPLETIONS, {"prompt": [5] * 250, "max_tokens": 10}, ("256", "260", "250", "10", "6")),
        (COMPLETIONS, {"prompt": [5] * 300}, ("256", "300", "255")),
        (CHAT, {"messages": MESSAGES, "max_completion_tokens": 1000}, ("256", "1000")),
        (CHAT, _user("a b " * 300), ("256", "255")),
    ],
)
def test_what_is_too_long_is_refused_with_the_numbers(
    run: Callable[..., None], path: str, body: dict[str, Any], numbers: tuple[str, ...]
) -> None:
    async def scenario() -> None:
        response = await Served().post(path, body)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert all(number in error["message"] for number in numbers), error["message"]

    run(scenario())


def test_every_sampling_field_reaches_the_engine(run: Callable[..., None]) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "n": 2,
        "seed": 11,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "max_tokens": 5,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "prompt_logprobs": 1,
    }
    given = {**fields, "stop": "END", "stop_token_ids": [9], "logit_bias": {"5": -100}, "priority": 3}

    async def scenario() -> None:
        served = Served()
        for path, prompt in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": MESSAGES})):
            assert (await served.post(path, {**prompt, **given})).status_code == 200
            params = served.engine.params[-1]
            assert {name: getattr(params, name) for name in fields} == fields
            assert (params.stop, params.stop_token_ids, params.logit_bias) == (("END",), (9,), {5: -100})
            assert served.engine.priorities[-1] == 3

    run(scenario())


def test_absent_and_null_fields_take_the_checkpoints_defaults(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served()
        await served.post(COMPLETIONS, {"prompt": [5, 6], "temperature": None, "suffix": None, "stop": None})
        answer = (await served.post(CHAT, {"messages": MESSAGES, "max_tokens": None})).json()
        completion, chat = served.engine.params
        assert (completion.temperature, completion.max_tokens) == (0.7, 16)
        assert chat.max_tokens == 256 - answer["usage"]["prompt_tokens"]  # all that the prompt leaves

    run(scenario())


def test_labels_that_clients_send_as_a_matter_of_course_are_taken(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        labels = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
        response = await Served().post(CHAT, {"messages": MESSAGES, **labels})
        assert response.status_code == 200

    run(scenario())


def test_an_unknown_model_is_not_found(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served(served_model_names=("demo", "other"))
        for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": MESSAGES})):
            response = await served.post(path, {**body, "model": "dem0"})
            error = response.json()["error"]
            assert (response.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")
            assert "did you mean 'demo'" in error["message"]
            assert (await served.post(path, {**body, "model": "other"})).json()["model"] == "other"

    run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/v1/completion", 404, "did you mean '/v1/completions'"),
        ("GET", COMPLETIONS, 405, "takes POST"),
        ("DELETE", "/health", 405, "takes GET"),
        ("GET", "/docs", 404, "no route /docs"),
    ],
)
def test_wrong_routes_and_methods_have_the_same_shape_of_error(
    run: Callable[..., None], method: str, path: str, status: int, words: str
) -> None:
    async def scenario() -> None:
        async with Served().client() as client:
            response = await client.request(method, path)
        assert response.status_code == status
        assert words in response.json()["error"]["message"]
        assert response.headers.get("allow") is not None or status == 404

    run(scenario())
