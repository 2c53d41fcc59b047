"""A small HTTP server that plays an OpenAI-compatible one: answers as told, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DONE = "[DONE]"


class OpenAIStub:
    """`answers` are what streaming requests get, one after the other; the last one again and again.

    An answer is a list of chunks, sent as events, or (status, body). A chunk that is a string is sent as it is.
    """

    def __init__(self, url: str, answers: Sequence[Any], models: Any, key: str | None) -> None:
        self.base_url = f"{url}/v1"
        self.requests: list[dict[str, Any]] = []
        self._answers = list(answers)
        self.models = models
        self.key = key

    def next_answer(self, body: dict[str, Any]) -> Any:
        self.requests.append(body)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def chat_chunks(*texts: str, finish_reason: str = "stop") -> list[Any]:
    """Events of a streamed chat answer."""
    deltas = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": finish_reason}]}
    return [{"choices": [{"index": 0, "delta": {"role": "assistant"}}]}, *deltas, end, DONE]


def text_chunks(*texts: str) -> list[Any]:
    """Events of a streamed completion."""
    return [*({"choices": [{"index": 0, "text": text}]} for text in texts), DONE]


@contextmanager
def openai_stub(
    answers: Sequence[Any] = (), *, models: Any = None, key: str | None = None
) -> Iterator[OpenAIStub]:
    """A stub that runs until the end of the block.

    Args:
        models: JSON of its list of models; one called "stub" by default.
        key: that it asks for.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    default_models = {"object": "list", "data": [{"id": "stub"}, {"id": "other"}]}
    stub = OpenAIStub(
        f"http://127.0.0.1:{server.server_port}",
        answers,
        models if models is not None else default_models,
        key,
    )
    server.stub = stub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    @property
    def _stub(self) -> OpenAIStub:
        return self.server.stub  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        if self._refused():
            return
        if self.path == "/v1/models":
            self._send(200, self._stub.models)
        else:
            self._send(404, {"error": {"message": f"there is no route {self.path}"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self._refused():
            return
        answer = self._stub.next_answer({**body, "_path": self.path})
        if isinstance(answer, tuple):
            self._send(*answer)
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for chunk in answer:
            data = chunk if isinstance(chunk, str) else json.dumps(chunk)
            self.wfile.write(f"data: {data}\n\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def _refused(self) -> bool:
        if self._stub.key is None or self.headers["authorization"] == f"Bearer {self._stub.key}":
            return False
        self._send(401, {"error": {"message": "Incorrect API key provided"}})
        return True

    def _send(self, status: int, body: Any) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
