"""A streamed answer, from bytes with their arrival times to what was measured of it. No network, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec

# Of a chat's delta, beside its content.
_ALSO_OUTPUT = ("reasoning_content", "reasoning", "tool_calls")
_MAX_OTHER_LINES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What became of one request. Times are seconds since the run began."""

    planned_s: float  # when it should have been sent: by the arrival schedule, or when a slot came free
    sent_s: float
    chunk_times_s: tuple[
        float, ...
    ] = ()  # arrivals of pieces of output; the first is that of the first token
    ended_s: float  # arrival of the last piece, or of the error
    prompt_tokens: int = 0
    output_tokens: int = 0
    counted_by_server: bool = (
        True  # False: output_tokens is the number of pieces, for want of the server's usage
    )
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.chunk_times_s[0] - self.sent_s

    @property
    def e2el_s(self) -> float:
        """End-to-end latency."""
        return self.ended_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None where there is only one."""
        if self.output_tokens < 2:
            return None
        return (self.ended_s - self.chunk_times_s[0]) / (self.output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        """Inter-token latencies: gaps between arrivals of pieces."""
        return [later - earlier for earlier, later in pairwise(self.chunk_times_s)]


class AnswerReader:
    """Takes the body of a streamed answer as it arrives; knows in the end what `RequestRecord` asks.

    A piece of output is a chunk with choices. Not a piece is one that only names the role, nor one that only gives
    the reason for the end: it moves the end, but adds no gap.
    """

    def __init__(self) -> None:
        self.text: list[str] = []
        self.chunk_times_s: list[float] = []
        self.ended_s: float | None = None
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.done = False
        self.error: str | None = None
        self._other_lines: list[bytes] = []
        self._rest = b""

    @property
    def unread(self) -> bytes:
        """What came that was no event: the body of a refusal."""
        return b"\n".join([*self._other_lines, self._rest])

    def feed(self, data: bytes, time_s: float) -> None:
        """The next bytes of the body, and when they arrived."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), time_s)
            elif len(self._other_lines) < _MAX_OTHER_LINES:
                self._other_lines.append(line)

    def _event(self, data: bytes, time_s: float) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        try:
            chunk = msgspec.json.decode(data)
        except msgspec.DecodeError:
            self._fail(f"an event is no JSON: {data[:200]!r}")
            return
        if not isinstance(chunk, dict) or chunk.get("error"):
            error = chunk.get("error") if isinstance(chunk, dict) else chunk
            self._fail(str(error.get("message") if isinstance(error, dict) else error))
            return
        for choice in chunk.get("choices") or ():
            self._piece(choice, time_s)
        if usage := chunk.get("usage"):
            self.prompt_tokens = usage.get("prompt_tokens")
            self.output_tokens = usage.get("completion_tokens")

    def _piece(self, choice: dict[str, Any], time_s: float) -> None:
        delta = choice.get("delta")
        source = choice if delta is None else delta
        text = source.get("text" if delta is None else "content") or ""
        said = text or any(source.get(name) for name in _ALSO_OUTPUT)
        if choice.get("finish_reason") is not None:
            self.ended_s = time_s
            is_piece = said or not self.chunk_times_s  # the only token may have no text
        else:
            is_piece = said or delta is None
        if is_piece:
            self.text.append(text)
            self.chunk_times_s.append(time_s)
            self.ended_s = time_s

    def _fail(self, message: str) -> None:
        self.error = self.error or message
        self.done = True

    def record(
        self, *, planned_s: float, sent_s: float, closed_s: float, prompt_len: int | None
    ) -> RequestRecord:
        """What was measured, once the stream has ended at `closed_s`."""
        error = self.error
        if error is None and not self.chunk_times_s:
            error = "the answer has no output"
        elif error is None and not self.done:
            error = "the stream ended before the answer was complete"
        failed = error is not None
        return RequestRecord(
            planned_s=planned_s,
            sent_s=sent_s,
            chunk_times_s=tuple(self.chunk_times_s),
            ended_s=closed_s if failed or self.ended_s is None else self.ended_s,
            prompt_tokens=self.prompt_tokens if self.prompt_tokens is not None else prompt_len or 0,
            output_tokens=self.output_tokens if self.output_tokens is not None else len(self.chunk_times_s),
            counted_by_server=self.output_tokens is not None,
            error=error,
        )
