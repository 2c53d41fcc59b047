"""The official client drives every route, whole and streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.server.conftest import Served
from tests.server.fake_engine import REPLY

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


def test_a_completion_whole_and_streamed(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        client = Served().openai()
        whole = await client.completions.create(model="demo", prompt="Hello", max_tokens=100)
        stream = await client.completions.create(model="demo", prompt="Hello", max_tokens=100, stream=True)
        pieces = [chunk.choices[0] async for chunk in stream]

        assert whole.object == "text_completion"
        assert whole.choices[0].text == REPLY == "".join(piece.text for piece in pieces)
        assert whole.choices[0].finish_reason == "stop" == pieces[-1].finish_reason
        assert all(piece.finish_reason is None for piece in pieces[:-1])
        assert len(pieces) > 3
        assert whole.usage is not None
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    run(scenario())


def test_choices_of_many_prompts_are_numbered_prompt_by_prompt(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        client = Served().openai()
        request: Any = {"model": "demo", "prompt": [[5, 6], [7]], "n": 2, "max_tokens": 3}
        whole = await client.completions.create(**request)
        texts = dict.fromkeys(range(4), "")
        async for chunk in await client.completions.create(**request, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text

        assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
        assert {choice.index: choice.text for choice in whole.choices} == texts
        assert texts[0] == texts[2] != texts[1]  # the fake engine's second sample begins a token later
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 12)

    run(scenario())


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_gives_the_prompt_with_its_logprobs(run: Callable[..., None], max_tokens: int) -> None:
    async def scenario() -> None:
        served = Served()
        completion = await served.openai().completions.create(
            model="demo", prompt="hello you", echo=True, logprobs=2, max_tokens=max_tokens
        )
        (choice,) = completion.choices
        generated = served.engine.tokenizer.decode(served.engine.reply_ids[:max_tokens])
        logprobs: Any = choice.logprobs
        assert choice.text == "hello you" + generated == "".join(logprobs.tokens)
        assert logprobs.token_logprobs[:2] == [None, -0.5]
        assert logprobs.top_logprobs[0] is None
        assert len(logprobs.top_logprobs[1]) == 2
        for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
            assert choice.text[offset:].startswith(token)
        assert completion.usage is not None
        assert completion.usage.completion_tokens == max_tokens

    run(scenario())


def test_streamed_logprobs_are_those_of_the_whole(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        client = Served().openai()
        request: Any = {"model": "demo", "prompt": "hello", "echo": True, "logprobs": 1, "max_tokens": 6}
        whole: Any = (await client.completions.create(**request)).choices[0].logprobs
        columns: dict[str, list[Any]] = {name: [] for name in whole.model_dump()}
        async for chunk in await client.completions.create(**request, stream=True):
            piece: Any = chunk.choices[0].logprobs
            for name, column in columns.items():
                column.extend(getattr(piece, name))
        assert columns == whole.model_dump()

    run(scenario())


def test_a_chat_whole_and_streamed(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        client = Served().openai()
        whole = await client.chat.completions.create(model="demo", messages=MESSAGES)
        stream = await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
        deltas = [chunk.choices[0] async for chunk in stream]

        assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", REPLY)
        assert "".join(choice.delta.content or "" for choice in deltas) == REPLY
        assert [choice.delta.role for choice in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert [choice.finish_reason for choice in deltas] == [None] * (len(deltas) - 1) + ["stop"]

    run(scenario())


def test_chat_logprobs_whole_and_streamed(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        client = Served().openai()
        request: Any = {"model": "demo", "messages": MESSAGES, "logprobs": True, "max_completion_tokens": 5}
        whole = await client.chat.completions.create(**request, top_logprobs=2)
        streamed = []
        async for chunk in await client.chat.completions.create(**request, top_logprobs=2, stream=True):
            if chunk.choices[0].logprobs:
                streamed.extend(chunk.choices[0].logprobs.content or [])
        bare = await client.chat.completions.create(**request)

        content = whole.choices[0].logprobs.content  # type: ignore[union-attr]
        assert content == streamed
        assert "".join(entry.token for entry in content or []) == whole.choices[0].message.content
        for entry in content or []:
            assert bytes(entry.bytes or []) == entry.token.encode()
            assert [top.logprob for top in entry.top_logprobs] == [-0.5, -1.5]
        assert bare.choices[0].logprobs.content[0].top_logprobs == []  # type: ignore[union-attr, index]

    run(scenario())


def test_usage_comes_in_a_last_chunk_of_its_own(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        client = Served().openai()
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        chat = await client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=4, **options)
        completion = await client.completions.create(model="demo", prompt=[5, 6], max_tokens=4, **options)
        for stream in (chat, completion):
            chunks: list[Any] = [chunk async for chunk in stream]
            assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
            assert all(chunk.usage is None for chunk in chunks[:-1])
            assert chunks[-1].usage.completion_tokens == 4

    run(scenario())


def test_usage_tells_the_prompt_tokens_that_were_cached_once_a_prompt(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served()
        served.engine.num_cached = [3, 5]  # the second sample finds what the first one left
        client = served.openai()
        completion: dict[str, Any] = {"model": "demo", "prompt": [[5, 6, 7, 8, 9, 10]] * 3, "max_tokens": 4}
        chat: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 4}
        for create, request, cached in (
            (client.completions.create, completion, 9),
            (client.chat.completions.create, chat, 3),
        ):
            whole: Any = await create(**request, n=2)
            options = {"include_usage": True}
            chunks: Any = [c async for c in await create(**request, n=2, stream=True, stream_options=options)]
            for usage in (whole.usage, chunks[-1].usage):
                assert usage.prompt_tokens_details.cached_tokens == cached
            assert whole.usage == chunks[-1].usage

    run(scenario())


def test_token_ids_are_given_where_they_are_asked_for(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served()
        client = served.openai()
        extra: Any = {"extra_body": {"return_token_ids": True}, "max_tokens": 3}
        ids: list[int] = []
        async for chunk in await client.chat.completions.create(
            model="demo", messages=MESSAGES, stream=True, **extra
        ):
            ids += getattr(chunk.choices[0], "token_ids", [])
        whole: Any = await client.completions.create(model="demo", prompt=[5, 6], **extra)
        assert ids == whole.choices[0].token_ids == served.engine.reply_ids[:3]
        assert whole.choices[0].prompt_token_ids == [5, 6]

    run(scenario())


def test_models_are_listed_by_every_name(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        client = Served(served_model_names=("org/demo", "other")).openai()
        listed = [model.id async for model in client.models.list()]
        assert listed == ["org/demo", "other"]
        assert (await client.models.retrieve("org/demo")).id == "org/demo"
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.models.retrieve("nothing")

    run(scenario())


def test_errors_are_the_clients_own_classes(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served(api_keys=("right",))
        with pytest.raises(openai.AuthenticationError, match="key is wrong"):
            await served.openai("wrong").completions.create(model="demo", prompt="a")
        client = served.openai("right")
        with pytest.raises(openai.BadRequestError, match="top_p") as caught:
            await client.completions.create(model="demo", prompt="a", top_p=2)
        assert caught.value.param == "top_p"
        with pytest.raises(openai.BadRequestError, match="no embeddings"):
            await client.embeddings.create(model="demo", input="a")

    run(scenario())


def test_tokenize_and_detokenize_are_inverse(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served()
        text = (await served.post("/tokenize", {"prompt": "hello you", "return_token_strs": True})).json()
        back = (await served.post("/detokenize", {"tokens": text["tokens"]})).json()
        chat = (await served.post("/tokenize", {"messages": MESSAGES})).json()
        assert back == {"prompt": "hello you"} == {"prompt": "".join(text["token_strs"])}
        assert (text["count"], text["max_model_len"]) == (len(text["tokens"]), 256)
        rendered = served.engine.tokenizer.apply_chat_template(MESSAGES)
        assert served.engine.tokenizer.decode(chat["tokens"], skip_special_tokens=False) == rendered

    run(scenario())
