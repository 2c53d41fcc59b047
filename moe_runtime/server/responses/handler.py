"""/v1/responses: items in, the assistant's items out, whole or as events."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator

from fastapi import Request, Response

from moe_runtime.server.chat_choices import ChatChoices, ChatPiece
from moe_runtime.server.errors import ApiError
from moe_runtime.server.http import EventStream, explain, json_answer, read_json, while_connected
from moe_runtime.server.logprobs import chat_logprobs
from moe_runtime.server.prompts import encode
from moe_runtime.server.protocol.chat import TokenLogprob
from moe_runtime.server.protocol.responses import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    ResponseError,
    ResponseObject,
    ResponsesRequest,
    ResponsesUsage,
    Status,
)
from moe_runtime.server.responses.chat_request import chat_request, in_our_names
from moe_runtime.server.responses.events import ResponseEvents
from moe_runtime.server.state import ServerState
from moe_runtime.tokenizer import Tokenizer

ROUTE = "/v1/responses"


async def create_response(http: Request) -> Response:
    """The handler."""
    state: ServerState = http.app.state.server
    request = ResponsesRequest.parse(await read_json(http, state.config.body_timeout_s))
    try:
        choices = await while_connected(
            http.receive,
            ChatChoices.prepare(state, chat_request(request), http, answer_id=f"resp_{uuid.uuid4().hex}"),
        )
    except ApiError as error:
        raise in_our_names(error) from None
    answer = _Answer(request, choices, state.engine.tokenizer, http.state.id)
    if not request.stream:
        return json_answer(await while_connected(http.receive, answer.whole()))
    events = answer.events()
    first = await while_connected(http.receive, anext(events))
    return EventStream(first, events, request_id=http.state.id, send_timeout_s=state.config.send_timeout_s)


class _Answer:
    """One generation in the shapes of this route."""

    def __init__(
        self, request: ResponsesRequest, choices: ChatChoices, tokenizer: Tokenizer, http_id: str
    ) -> None:
        self._request = request
        self._choices = choices
        self._tokenizer = tokenizer
        self._http_id = http_id
        self._items = ResponseEvents()
        self._finish_reason: str | None = None

    @property
    def _is_complete(self) -> bool:
        return self._finish_reason in ("stop", "tool_calls")

    async def whole(self) -> ResponseObject:
        """Wait for the end."""
        async with self._choices as choices:
            for piece in await choices.whole():
                self._take(piece)
        return await self._final()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Events: all that a step has brought at once. What fails after the first of them ends in response.failed."""
        async with self._choices as choices:
            batch = await choices.next_batch()
            response = self._response("in_progress")
            yield b"".join(
                [
                    self._items.event("response.created", response=response),
                    self._items.event("response.in_progress", response=response),
                    *(event for piece in batch for event in self._take(piece)),
                ]
            )
            try:
                while batch := await choices.next_batch():
                    if events := [event for piece in batch for event in self._take(piece)]:
                        yield b"".join(events)
                final = await self._final()
            except Exception as error:
                final = self._failed(explain(error, self._http_id))
        yield self._items.event(f"response.{final.status}", response=final)

    def _take(self, piece: ChatPiece) -> list[bytes]:
        logprobs = self._logprobs(piece)
        events: list[bytes] = []
        for parsed in piece.parsed:
            events += self._items.take(parsed, logprobs)
            logprobs = []
        if piece.finish_reason is not None:
            self._finish_reason = piece.finish_reason
            events += self._items.finish(complete=self._is_complete)
        return events

    def _logprobs(self, piece: ChatPiece) -> list[TokenLogprob]:
        of_tokens = piece.delta.logprobs
        if not of_tokens:
            return []
        num_top = self._request.top_logprobs or 0
        return chat_logprobs(self._tokenizer, piece.delta.new_token_ids, of_tokens, num_top).content

    async def _final(self) -> ResponseObject:
        response = self._response("completed" if self._is_complete else "incomplete")
        if self._finish_reason == "length":
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        usage = self._choices.usage()
        reasoning = await encode(self._tokenizer, self._items.reasoning(), add_special_tokens=False)
        response.usage = ResponsesUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=len(reasoning)),
            total_tokens=usage.total_tokens,
        )
        return response

    def _failed(self, error: ApiError) -> ResponseObject:
        response = self._response("failed")
        # The API has a few codes for what may go wrong here; ours is in the message.
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        response.error = ResponseError(code=code, message=error.message)
        return response

    def _response(self, status: Status) -> ResponseObject:
        request, choices = self._request, self._choices
        response = ResponseObject(
            id=choices.answer_id,
            created_at=choices.created,
            status=status,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            max_tool_calls=request.max_tool_calls,
            model=choices.model,
            output=self._items.output,
            parallel_tool_calls=request.parallel_tool_calls is not False,
            reasoning={"effort": None, "summary": None, **(request.reasoning or {})},
            temperature=choices.job.params.temperature,
            text={"format": {"type": "text"}, **(request.text or {})},
            tool_choice=request.tool_choice or "auto",
            tools=request.tools or [],
            top_logprobs=request.top_logprobs or 0,
            top_p=choices.job.params.top_p,
            metadata=request.metadata or {},
        )
        if request.user is not None:
            response.user = request.user
        return response
