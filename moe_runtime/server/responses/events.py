"""ResponseEvents: output items put together piece by piece, and the events that tell of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from moe_runtime.server.parsers import ParsedDelta, ToolCallDelta
from moe_runtime.server.protocol.answers import encode
from moe_runtime.server.protocol.chat import TokenLogprob
from moe_runtime.server.protocol.responses import (
    FunctionCallItem,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Status,
)


class ResponseEvents:
    """The items of one answer in the order in which the model writes them; at most the last one is open.

    A whole answer takes `output` and leaves the events.
    """

    def __init__(self) -> None:
        self.output: list[OutputItem] = []
        self._open: OutputItem | None = None
        self._call_index = -1  # the parser's number of the open call
        self._text: list[str] = []  # pieces of the open item
        self._logprobs: list[TokenLogprob] = []  # of tokens that no text was sent for yet
        self._num_events = 0

    def event(self, name: str, /, **fields: Any) -> bytes:
        """One event, framed and numbered."""
        body = {"type": name, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: " + name.encode() + b"\ndata: " + encode(body) + b"\n\n"

    def take(self, piece: ParsedDelta, logprobs: Sequence[TokenLogprob] = ()) -> Iterator[bytes]:
        """Events of a piece; `logprobs` of its tokens go with the next text."""
        self._logprobs.extend(logprobs)
        if piece.reasoning:
            if not isinstance(self._open, ReasoningItem):
                yield from self._begin(ReasoningItem(id=_new_id("rs")), ReasoningText())
            self._text.append(piece.reasoning)
            yield self._about("response.reasoning_text.delta", content_index=0, delta=piece.reasoning)
        if piece.content:
            yield from self._add_content(piece.content)
        for call in piece.tool_calls:
            yield from self._add_call(call)

    def finish(self, *, complete: bool) -> Iterator[bytes]:
        """Events of the end; an answer without items gets a message that says nothing."""
        if not self.output:
            yield from self._begin(MessageItem(id=_new_id("msg")), OutputText())
        yield from self._end("completed" if complete else "incomplete")

    def reasoning(self) -> str:
        """All that the model has thought."""
        items = (item for item in self.output if isinstance(item, ReasoningItem))
        return "".join(part.text for item in items for part in item.content)

    def _add_content(self, text: str) -> Iterator[bytes]:
        if not isinstance(self._open, MessageItem):
            yield from self._begin(MessageItem(id=_new_id("msg")), OutputText())
        assert isinstance(self._open, MessageItem)
        self._text.append(text)
        logprobs, self._logprobs = self._logprobs, []
        self._open.content[0].logprobs.extend(logprobs)
        yield self._about("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _add_call(self, call: ToolCallDelta) -> Iterator[bytes]:
        if not isinstance(self._open, FunctionCallItem) or call.index != self._call_index:
            self._call_index = call.index
            item = FunctionCallItem(
                id=_new_id("fc"), call_id=call.id or _new_id("call"), name=call.name or ""
            )
            yield from self._begin(item)
        if call.arguments:
            self._text.append(call.arguments)
            yield self._about("response.function_call_arguments.delta", delta=call.arguments)

    def _begin(self, item: OutputItem, part: OutputText | ReasoningText | None = None) -> Iterator[bytes]:
        yield from self._end("completed")
        self._open = item
        self.output.append(item)
        self._text = []
        yield self.event("response.output_item.added", output_index=len(self.output) - 1, item=item)
        if part is not None:
            yield self._about("response.content_part.added", content_index=0, part=part)
            item.content = [part]  # type: ignore[union-attr]

    def _end(self, status: Status) -> Iterator[bytes]:
        item, text = self._open, "".join(self._text)
        if item is None:
            return
        match item:
            case FunctionCallItem():
                item.arguments = text
                yield self._about("response.function_call_arguments.done", name=item.name, arguments=text)
            case ReasoningItem(content=[part]):
                part.text = text
                yield self._about("response.reasoning_text.done", content_index=0, text=text)
                yield self._about("response.content_part.done", content_index=0, part=part)
            case MessageItem(content=[part]):
                part.text = text
                part.logprobs.extend(self._logprobs)  # of tokens after the last text
                self._logprobs = []
                yield self._about(
                    "response.output_text.done", content_index=0, text=text, logprobs=part.logprobs
                )
                yield self._about("response.content_part.done", content_index=0, part=part)
        item.status = status
        yield self.event("response.output_item.done", output_index=len(self.output) - 1, item=item)
        self._open = None

    def _about(self, name: str, /, **fields: Any) -> bytes:
        """An event about the open item."""
        assert self._open is not None
        return self.event(name, output_index=len(self.output) - 1, item_id=self._open.id, **fields)


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
