"""ChatChoices: the answers to a conversation as they are generated and parsed, whatever shape they are sent in."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from fastapi import Request

from moe_runtime.request import OutputDelta
from moe_runtime.server.conversation import render
from moe_runtime.server.errors import bad_request
from moe_runtime.server.generation import Generation, Job
from moe_runtime.server.parsers import OutputParser, ParsedDelta
from moe_runtime.server.prompts import room_for_output, served_name
from moe_runtime.server.protocol.answers import Usage
from moe_runtime.server.protocol.chat import ChatCompletionRequest
from moe_runtime.server.protocol.sampling import check_logprobs
from moe_runtime.server.state import ServerState
from moe_runtime.server.structured import structure_params
from moe_runtime.server.tool_use import PROMPT_END_TOKENS, ToolUse


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPiece:
    """What is new about one choice."""

    index: int  # of the choice
    parsed: Sequence[ParsedDelta]  # what its text means; together they say all of it
    delta: OutputDelta  # as the engine sent it
    finish_reason: str | None = None  # on the last piece; "tool_calls" where the choice calls functions


class ChatChoices:
    """An async context manager around one generation; made by `prepare`."""

    def __init__(
        self,
        job: Job,
        generation: Generation,
        tool_use: ToolUse,
        parsers: list[OutputParser],
        model: str,
        answer_id: str,
    ) -> None:
        self.job = job
        self.model = model  # as the request named it
        self.answer_id = answer_id
        self.created = int(time.time())  # seconds since the epoch
        self._generation = generation
        self._tool_use = tool_use
        self._parsers = parsers
        self._calls_tools = [False] * len(parsers)
        self._num_generated = 0

    @classmethod
    async def prepare(
        cls,
        state: ServerState,
        request: ChatCompletionRequest,
        http: Request,
        *,
        answer_id: str,
    ) -> Self:
        """Check the request and make its prompt.

        Args:
            answer_id: must not be in use.

        Raises:
            ApiError, UserError: the request cannot be served.
        """
        model = served_name(request.model, state.config)
        check_chat(state, request)
        engine = state.engine
        # Before the costly part: they may refuse the request.
        tool_use = ToolUse.of(request, state.config)
        overrides: dict[str, Any] = tool_use.structure() or structure_params(request)
        if request.logprobs:
            overrides["logprobs"] = request.top_logprobs or 0
        limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        params = request.sampling_params(engine.default_sampling_params, **overrides, max_tokens=limit)
        token_ids = await render(
            engine.tokenizer,
            request.messages,
            tools=tool_use.shown_tools,
            template=state.config.chat_template,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            template_variables=request.chat_template_kwargs,
            max_model_len=engine.max_model_len,
        )
        prompt_end = engine.tokenizer.decode(token_ids[-PROMPT_END_TOKENS:], skip_special_tokens=False)
        params = tool_use.after_reasoning(params, prompt_end)
        room = room_for_output(len(token_ids), limit, engine.max_model_len, default=None, param="messages")
        job = Job(text=None, token_ids=token_ids, params=dataclasses.replace(params, max_tokens=room))
        generation = Generation(
            state,
            [job],
            request_id=answer_id,
            arrival_time=http.state.arrival_time,
            priority=request.priority or 0,
        )
        parsers = [
            tool_use.make_parser(prompt_end, params.structured_outputs) for _ in range(request.num_choices)
        ]
        return cls(job, generation, tool_use, parsers, model, answer_id)

    async def __aenter__(self) -> Self:
        await self._generation.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._generation.__aexit__(kind, error, trace)

    async def next_batch(self) -> list[ChatPiece]:
        """Wait for something new, at most one piece a choice; empty after the last. Raises as Generation does."""
        return [self._piece(delta) for _, delta in await self._generation.next_batch()]

    async def whole(self) -> list[ChatPiece]:
        """Wait for the end; one piece a choice, in their order."""
        outputs = await self._generation.whole()
        return [self._piece(delta) for delta in outputs.values()]

    def usage(self) -> Usage:
        """Tokens so far."""
        cached = self._generation.num_cached_tokens
        return Usage.of(len(self.job.token_ids), self._num_generated, cached)

    def _piece(self, delta: OutputDelta) -> ChatPiece:
        index = delta.sample_index
        self._num_generated += len(delta.new_token_ids)
        parser = self._parsers[index]
        parsed = [parser.feed(delta.text)] if delta.text else []
        finish_reason: str | None = delta.finish_reason
        if finish_reason is not None:
            parsed.append(parser.finish())
        self._calls_tools[index] |= any(piece.tool_calls for piece in parsed)
        if finish_reason is not None:
            finish_reason = self._tool_use.finish_reason(finish_reason, called=self._calls_tools[index])
        return ChatPiece(index=index, parsed=parsed, delta=delta, finish_reason=finish_reason)


def check_chat(state: ServerState, request: ChatCompletionRequest) -> None:
    """Refuse what contradicts itself, goes beyond the limits, or needs what the server has not."""
    request.check_limits(state.config)
    check_logprobs("top_logprobs", request.top_logprobs, state.config)
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    if request.modalities not in (None, ["text"]):
        raise bad_request(f"modalities must be ['text'], got {request.modalities!r:.80}", "modalities")
