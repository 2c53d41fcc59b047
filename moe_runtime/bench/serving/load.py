"""Sending a load: conversations at their times, at most so many requests at once, every answer recorded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from moe_runtime.bench.serving.answer import AnswerReader, RequestRecord
from moe_runtime.bench.serving.http_stream import HttpError, HttpPool
from moe_runtime.bench.serving.prompts import Conversation, Turn
from moe_runtime.bench.serving.workload import ServeWorkload

_SHOWN_ERROR = 300


class Load:
    """One run against one server. Belongs to one event loop."""

    def __init__(self, pool: HttpPool, model: str, workload: ServeWorkload) -> None:
        self._pool = pool
        self._is_chat = workload.is_chat
        self._body: dict[str, Any] = {
            "model": model,
            "temperature": workload.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if workload.ignore_eos else {}),
            **workload.extra_body,
        }
        limit = workload.max_concurrency
        self._slots = asyncio.Semaphore(limit) if limit is not None else None
        self._freed_s = 0.0  # when the last slot came free
        self._began = time.perf_counter()

    async def run(
        self,
        conversations: Sequence[Conversation],
        starts_s: Sequence[float],
        on_record: Callable[[RequestRecord], None] = lambda record: None,
    ) -> tuple[list[RequestRecord], float]:
        """Send all; returns the records and the seconds that it took.

        Args:
            starts_s: when each conversation begins, in seconds from now, in ascending order.
            on_record: called after each request.
        """
        records: list[RequestRecord] = []
        self._began = time.perf_counter()

        async def converse(conversation: Conversation, start_s: float) -> None:
            async for record in self._converse(conversation, start_s):
                records.append(record)
                on_record(record)

        async with asyncio.TaskGroup() as group:
            for conversation, start_s in zip(conversations, starts_s, strict=True):
                if (wait_s := start_s - self._elapsed()) > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(converse(conversation, start_s))
        return records, self._elapsed()

    async def _converse(self, conversation: Conversation, start_s: float) -> AsyncIterator[RequestRecord]:
        """One turn after the other, each with all that was said before; a failure ends it."""
        said: Any = [] if self._is_chat else ""
        for number, turn in enumerate(conversation.turns):
            if number:
                await asyncio.sleep(conversation.think_time_s)
                start_s += conversation.think_time_s
            prompt = _continued(said, turn)
            async with self._slot(start_s) as planned_s:
                reader, record = await self._ask(prompt, turn, planned_s)
            yield record
            if record.error is not None:
                return
            start_s = self._elapsed()
            if len(conversation.turns) > 1:
                said = _answered(prompt, "".join(reader.text))

    @contextlib.asynccontextmanager
    async def _slot(self, start_s: float) -> AsyncIterator[float]:
        """Hold one of the requests that may be in flight; yields when it should be sent: waiting is planned."""
        if self._slots is None:
            yield start_s
            return
        must_wait = self._slots.locked()
        async with self._slots:
            yield max(start_s, self._freed_s) if must_wait else start_s
            self._freed_s = self._elapsed()

    async def _ask(self, prompt: Any, turn: Turn, planned_s: float) -> tuple[AnswerReader, RequestRecord]:
        reader = AnswerReader()
        field = "messages" if self._is_chat else "prompt"
        body = json.dumps({**self._body, field: prompt, "max_tokens": turn.output_len}).encode()
        began = self._began
        sent_s = self._elapsed()
        try:
            status = await self._pool.post(body, lambda data, now: reader.feed(data, now - began))
            if not 200 <= status < 300:
                reader.error = f"HTTP {status}: {_refusal(reader.unread)}"
        except HttpError as failure:
            reader.error = reader.error or str(failure)
        record = reader.record(
            planned_s=planned_s, sent_s=sent_s, closed_s=self._elapsed(), prompt_len=turn.prompt_len
        )
        return reader, record

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began


def _continued(said: Any, turn: Turn) -> Any:
    """All that was said, and this turn's prompt."""
    if isinstance(said, list):
        new = [{"role": "user", "content": turn.prompt}] if isinstance(turn.prompt, str) else turn.prompt
        return [*said, *new]
    return f"{said}\n{turn.prompt}" if said else turn.prompt


def _answered(prompt: Any, answer: str) -> Any:
    if isinstance(prompt, list):
        return [*prompt, {"role": "assistant", "content": answer}]
    return prompt + answer


def _refusal(body: bytes) -> str:
    """What an error's body says, on one line."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        error = content.get("error", content) if isinstance(content, dict) else content
        message = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
        text = str(message or text)
    return " ".join(text.split())[:_SHOWN_ERROR]
