"""/v1/chat/completions: conversations in, the assistant's messages out, whole or streamed."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence

from fastapi import Request, Response

from moe_runtime.server.chat_choices import ChatChoices, ChatPiece
from moe_runtime.server.http import DONE, EventStream, event, json_answer, read_json, while_connected
from moe_runtime.server.logprobs import chat_logprobs, prompt_logprobs
from moe_runtime.server.parsers import ParsedDelta, ToolCallDelta
from moe_runtime.server.protocol.answers import encode
from moe_runtime.server.protocol.chat import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FunctionCall,
    ToolCall,
)
from moe_runtime.server.state import ServerState
from moe_runtime.tokenizer import Tokenizer

ROUTE = "/v1/chat/completions"


async def create_chat_completion(http: Request) -> Response:
    """The handler."""
    state: ServerState = http.app.state.server
    request = ChatCompletionRequest.parse(await read_json(http, state.config.body_timeout_s))
    choices = await while_connected(
        http.receive,
        ChatChoices.prepare(state, request, http, answer_id=f"chatcmpl-{uuid.uuid4().hex}"),
    )
    answer = _ChatAnswer(request, choices, state.engine.tokenizer)
    if not request.stream:
        return json_answer(await while_connected(http.receive, answer.whole()))
    chunks = answer.chunks()
    first = await while_connected(http.receive, anext(chunks))
    return EventStream(first, chunks, request_id=http.state.id, send_timeout_s=state.config.send_timeout_s)


class _ChatAnswer:
    """Choices in the shapes of this route."""

    def __init__(self, request: ChatCompletionRequest, choices: ChatChoices, tokenizer: Tokenizer) -> None:
        self._request = request
        self._choices = choices
        self._tokenizer = tokenizer
        options = request.stream_options
        self._wants_usage = options is not None and bool(options.include_usage)
        self._continuous_usage = options is not None and bool(options.continuous_usage_stats)
        self._begun: set[int] = set()  # choices whose first chunk is out

    async def whole(self) -> ChatCompletion:
        """Wait for every choice."""
        choices = self._choices
        async with choices:
            pieces = await choices.whole()
        answer = ChatCompletion(
            id=choices.answer_id,
            created=choices.created,
            model=choices.model,
            choices=[self._choice(piece) for piece in pieces],
            usage=choices.usage(),
        )
        if self._request.prompt_logprobs is not None:
            answer.prompt_logprobs = prompt_logprobs(pieces[0].delta.prompt_logprobs or [])
        if self._request.return_token_ids:
            answer.prompt_token_ids = choices.job.token_ids
        return answer

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Events: all that a step has brought at once, at the end perhaps the usage, and the mark of the end."""
        async with self._choices as choices:
            while batch := await choices.next_batch():
                events = [
                    event(encode(self._chunk([choice]))) for piece in batch for choice in self._pieces(piece)
                ]
                if events:
                    yield b"".join(events)
        if self._wants_usage:
            chunk = self._chunk([])
            chunk.usage = choices.usage()
            yield event(encode(chunk))
        yield DONE

    def _choice(self, piece: ChatPiece) -> ChatChoice:
        message = ChatMessage()
        content = "".join(parsed.content for parsed in piece.parsed)
        if reasoning := "".join(parsed.reasoning for parsed in piece.parsed):
            message.reasoning_content = reasoning
        if calls := _whole_calls(piece.parsed):
            message.tool_calls = calls
        # OpenAI gives null where functions are called and nothing is said.
        message.content = content or (None if calls else "")
        choice = ChatChoice(
            index=piece.index,
            message=message,
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish_reason,
            stop_reason=piece.delta.stop_reason,
        )
        if self._request.return_token_ids:
            choice.token_ids = list(piece.delta.new_token_ids)
        return choice

    def _pieces(self, piece: ChatPiece) -> Iterator[ChatChunkChoice]:
        """A choice's first chunk says who speaks, its last why it ends, those between what is said."""
        index = piece.index
        if index not in self._begun:
            self._begun.add(index)
            yield ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))
        logprobs = self._logprobs(piece)
        token_ids = list(piece.delta.new_token_ids) if self._request.return_token_ids else []
        deltas = [delta for parsed in piece.parsed if (delta := _delta(parsed)) is not None]
        if not deltas and (token_ids or (logprobs and logprobs.content)):
            deltas = [ChatDelta(content="")]
        for delta in deltas:
            choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs)
            if token_ids:
                choice.token_ids = token_ids
            yield choice
            logprobs, token_ids = None, []
        if piece.finish_reason is not None:
            yield ChatChunkChoice(
                index=index,
                delta=ChatDelta(),
                finish_reason=piece.finish_reason,
                stop_reason=piece.delta.stop_reason,
            )

    def _logprobs(self, piece: ChatPiece) -> ChatLogprobs | None:
        if not self._request.logprobs:
            return None
        return chat_logprobs(
            self._tokenizer,
            piece.delta.new_token_ids,
            piece.delta.logprobs or (),
            self._request.top_logprobs or 0,
        )

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        of = self._choices
        chunk = ChatCompletionChunk(id=of.answer_id, created=of.created, model=of.model, choices=choices)
        if self._continuous_usage:
            chunk.usage = of.usage()
        elif self._wants_usage:
            chunk.usage = None
        return chunk


def _delta(parsed: ParsedDelta) -> ChatDelta | None:
    """A parsed piece as a delta; None if it says nothing."""
    delta = ChatDelta()
    if parsed.reasoning:
        delta.reasoning_content = parsed.reasoning
    if parsed.content:
        delta.content = parsed.content
    if parsed.tool_calls:
        delta.tool_calls = [_call_piece(call) for call in parsed.tool_calls]
    return delta if parsed.reasoning or parsed.content or parsed.tool_calls else None


def _call_piece(call: ToolCallDelta) -> ToolCall:
    piece = ToolCall(index=call.index, function=FunctionCall(arguments=call.arguments))
    if call.name is not None:
        piece.function.name = call.name
    if call.id is not None:
        piece.id, piece.type = call.id, "function"
    return piece


def _whole_calls(parsed: Sequence[ParsedDelta]) -> list[ToolCall]:
    """Pieces of calls put together, one ToolCall a call."""
    calls: dict[int, ToolCall] = {}
    for call in (call for piece in parsed for call in piece.tool_calls):
        whole = calls.setdefault(call.index, ToolCall(type="function", function=FunctionCall()))
        if call.id is not None:
            whole.id = call.id
        if call.name is not None:
            whole.function.name = call.name
        whole.function.arguments += call.arguments
    return list(calls.values())
