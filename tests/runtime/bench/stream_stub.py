"""An OpenAI-compatible server that computes nothing: it streams tokens at a stated pace, as cheaply as Python can.

    python -m tests.runtime.bench.stream_stub --port 8000 --interval 0.02

is what the capacity of `bench serve` in docs/benchmarks.md was measured against.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StreamStub:
    """How it answers, and what it was asked."""

    interval_s: float = 0.0  # between tokens
    takes_token_ids: bool = True
    sends_usage: bool = True
    refuse_every: int | None = None  # every so many measured requests one is answered 503
    drop_every: int | None = None  # or its connection is closed after the first token
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection to its end."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.decode().lower().split("\r\n")
                lengths = [int(line.split(":")[1]) for line in lines if line.startswith("content-length")]
                body = await reader.readexactly(lengths[0]) if lengths else b""
                if not await self._answer(head.split()[1].decode(), body, writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        """Returns whether the connection goes on."""
        if path == "/v1/models":
            _send(writer, 200, {"data": [{"id": "stub"}]})
            return True
        request = json.loads(body)
        self.bodies.append(request)
        number = len(self.bodies)
        if isinstance(request.get("prompt"), list) and not self.takes_token_ids:
            _send(writer, 400, {"error": {"message": "prompt must be a string"}})
            return True
        if self.refuse_every and number % self.refuse_every == 0:
            _send(writer, 503, {"error": {"message": "too many requests wait"}})
            return True
        drops = self.drop_every is not None and number % self.drop_every == 0
        await self._stream(request, writer, 1 if drops else request["max_tokens"])
        if not drops:
            writer.write(_event(b"[DONE]") + b"0\r\n\r\n")
            await writer.drain()
        return not drops

    async def _stream(self, request: dict[str, Any], writer: asyncio.StreamWriter, num_tokens: int) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head)
        if "messages" in request:
            writer.write(_json_event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]}))
            choice: dict[str, Any] = {"index": 0, "delta": {"content": " word"}, "finish_reason": None}
        else:
            choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None}
        names = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "stub"}
        piece = _json_event({**names, "choices": [choice], "usage": None})
        for _ in range(num_tokens):
            if self.interval_s:
                await asyncio.sleep(self.interval_s)
            writer.write(piece)
        end = {**choice, "finish_reason": "length", **({"delta": {}} if "delta" in choice else {"text": ""})}
        writer.write(_json_event({**names, "choices": [end]}))
        if self.sends_usage:
            prompt = request.get("prompt", "")
            num_prompt = len(prompt) if isinstance(prompt, list) else 7
            usage = {"prompt_tokens": num_prompt, "completion_tokens": num_tokens}
            writer.write(_json_event({**names, "choices": [], "usage": usage}))


@contextmanager
def streaming(stub: StreamStub) -> Iterator[StreamStub]:
    """The stub in a thread of its own until the end of the block."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    ended = asyncio.Event()

    async def serve() -> None:
        async with await asyncio.start_server(stub.handle, "127.0.0.1", stub.port) as server:
            stub.port = server.sockets[0].getsockname()[1]
            ready.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    ready.wait(10)
    try:
        yield stub
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


def _json_event(content: Any) -> bytes:
    return _event(json.dumps(content).encode())


def _event(data: bytes) -> bytes:
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(event), event)


def _send(writer: asyncio.StreamWriter, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--interval", type=float, default=0.02, help="seconds between tokens of a stream")
    args = parser.parse_args()

    async def serve() -> None:
        stub = StreamStub(interval_s=args.interval)
        async with await asyncio.start_server(stub.handle, "127.0.0.1", args.port, backlog=4096) as server:
            await server.serve_forever()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
