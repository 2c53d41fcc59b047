"""Hostile input and hostile clients: an error with the right status, and a server that goes on serving."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from moe_runtime.server import connections
from tests.server.conftest import Served, listening

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
LIMIT = 100_000  # bytes of a body, where a test sets it
LONG: dict[str, Any] = {"prompt": "a", "stream": True, "max_tokens": 200, "ignore_eos": True}

Answer = tuple[int, dict[str, str], bytes]


class Client:
    """A connection whose every byte is in the test's hands."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, url: str) -> Client:
        address = urlsplit(url)
        return cls(*await asyncio.open_connection(address.hostname, address.port))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> Answer:
        """The next answer; it must have a length."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        return int(first.split()[1]), headers, await self.reader.readexactly(int(headers["content-length"]))

    async def closed(self) -> bool:
        """Wait for the server to close; whether it said nothing more."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.writer.close()


def request(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def completion(**fields: Any) -> bytes:
    return json.dumps({"prompt": "a", "max_tokens": 2, **fields}).encode()


async def _check_alive(url: str) -> None:
    client = await Client.connect(url)
    client.send(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    status, _, _ = await client.answer()
    client.send(request(COMPLETIONS, completion()))
    assert (status, (await client.answer())[0]) == (200, 200)
    client.close()


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def _error(answer: Answer) -> tuple[int, str, str]:
    status, headers, body = answer
    error = json.loads(body)["error"]
    assert headers["content-type"] == "application/json"
    assert set(error) == {"message", "type", "param", "code"}
    assert len(body) < 2000
    return status, error["code"], error["message"]


BIG = "1" + "0" * 400
RAW = b'{"prompt": "a", %s}'


def _nested(levels: int, opening: str, inner: str, closing: str) -> str:
    return opening * levels + inner + closing * levels


def _chat(content: Any = "a", **fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()


def _structured(kind: str, value: Any) -> bytes:
    return completion(structured_outputs={kind: value})


BAD_BODIES: dict[str, tuple[str, bytes, str | None]] = {
    "single quotes": (COMPLETIONS, b"{'prompt': 'a'}", "invalid_json"),
    "a comma too many": (COMPLETIONS, b'{"prompt": "a",}', "invalid_json"),
    "words after the object": (COMPLETIONS, b'{"prompt": "a"} {}', "invalid_json"),
    "a byte order mark": (COMPLETIONS, b'\xef\xbb\xbf{"prompt": "a"}', "invalid_json"),
    "UTF-16": (COMPLETIONS, '{"prompt": "a"}'.encode("utf-16"), "invalid_json"),
    "an overlong encoding": (COMPLETIONS, b'{"prompt": "\xc0\x80"}', "invalid_json"),
    "null": (COMPLETIONS, b"null", None),
    "a string": (RESPONSES, b'"prompt"', None),
    "a number": (CHAT, b"12", None),
    "infinity": (COMPLETIONS, RAW % b'"top_p": Infinity', "invalid_json"),
    "minus infinity": (COMPLETIONS, RAW % b'"top_p": -Infinity', "invalid_json"),
    "a float that overflows": (COMPLETIONS, RAW % b'"temperature": 1e400', None),
    "5000 digits": (COMPLETIONS, RAW % b'"seed": ' + b"1" * 5000, "invalid_json"),
    "10,000 levels": (
        CHAT,
        _chat(tools=[]).replace(b"[]", _nested(10_000, "[", "", "]").encode()),
        "invalid_json",
    ),
    "10,000 levels in a text": (
        CHAT,
        json.dumps(
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"function": {"name": "f", "arguments": _nested(10_000, '{"a":', "1", "}")}}
                        ],
                    }
                ]
            }
        ).encode(),
        None,
    ),
    **{
        f"{name} of 10**400": (path, f'{{{start}, "{name}": {BIG}}}'.encode(), "invalid_type")
        for path, start, names in (
            (
                COMPLETIONS,
                '"prompt": "a"',
                "n seed top_k min_tokens max_tokens priority logprobs prompt_logprobs",
            ),
            (RESPONSES, '"input": "a"', "max_output_tokens top_logprobs seed"),
        )
        for name in names.split()
    },
    "a stop token of 10**400": (COMPLETIONS, RAW % f'"stop_token_ids": [{BIG}]'.encode(), "invalid_type"),
    "a token of 10**400": (COMPLETIONS, f'{{"prompt": [{BIG}]}}'.encode(), None),
    "a bias of 10**400": (COMPLETIONS, RAW % f'"logit_bias": {{"5": {BIG}}}'.encode(), "invalid_type"),
    "a biased token of 5000 digits": (COMPLETIONS, completion(logit_bias={"9" * 5000: 1}), None),
    "a float for an integer": (COMPLETIONS, completion(max_tokens=1.0), "invalid_type"),
    "a boolean for an integer": (COMPLETIONS, completion(max_tokens=True), "invalid_type"),
    "a negative token": (COMPLETIONS, completion(prompt=[-1]), None),
    "a negative penalty": (COMPLETIONS, completion(presence_penalty=-99), None),
    "half a character in arguments": (
        RESPONSES,
        json.dumps(
            {
                "input": [
                    {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": "\\ud800"}'}
                ]
            }
        ).encode(),
        None,
    ),
    "a field with a very long name": (
        COMPLETIONS,
        completion(**{"temperature" * 10_000: 1}),
        "unknown_parameter",
    ),
    "100,000 unknown fields": (
        COMPLETIONS,
        json.dumps({f"f{n}": n for n in range(100_000)}).encode(),
        "unknown_parameter",
    ),
    "long stop strings": (COMPLETIONS, completion(stop=["x" * 10_000] * 10), None),
    "many stop tokens": (COMPLETIONS, completion(stop_token_ids=list(range(500_000))), None),
    "many biases": (COMPLETIONS, completion(logit_bias={str(n): 1 for n in range(100_000)}), None),
    "a list where a word is wanted": (COMPLETIONS, completion(response_format={"type": ["text"]}), None),
    "an object where a part's type is wanted": (CHAT, _chat([{"type": {}}]), None),
    "a deep schema": (
        COMPLETIONS,
        _structured("json", json.loads(_nested(80, '{"properties": {"a": ', "{}", "}}"))),
        None,
    ),
    "a schema of 10,000 levels": (
        COMPLETIONS,
        _structured("json", _nested(3_000, '{"properties": {"a": ', "{}", "}}")),
        None,
    ),
    "a large schema": (COMPLETIONS, _structured("json", {"enum": ["x" * n for n in range(1000)]}), None),
    "a deep expression": (COMPLETIONS, _structured("regex", _nested(5000, "(", "a", ")")), None),
    "a long expression": (COMPLETIONS, _structured("regex", "a?" * 10_000), None),
    "a deep grammar": (
        COMPLETIONS,
        _structured("grammar", "root ::= " + _nested(9000, "(", '"a"', ")")),
        None,
    ),
    "100,000 messages": (
        CHAT,
        json.dumps({"messages": [{"role": "user", "content": "a"}] * 100_000}).encode(),
        "context_length_exceeded",
    ),
    "a prompt of 7 MB": (COMPLETIONS, completion(prompt="a" * 7_000_000), "context_length_exceeded"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_refused(run: Callable[..., None], name: str) -> None:
    path, body, code = BAD_BODIES[name]

    async def scenario() -> None:
        served = Served()
        async with served.listening() as url:
            client = await Client.connect(url)
            client.send(request(path, body))
            assert _error(await client.answer())[:2] == (400, code)
            assert not served.engine.started
            client.close()
            await _check_alive(url)

    run(scenario())


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "max_tokens": 1, "max_tokens": 2}',  # the last of equal keys counts, as in Python
        b'{"prompt": "\\u0000", "max_tokens": 2}',
        b'{"prompt": "a", "max_tokens": 2' + b" " * 50_000 + b"}",
    ],
)
def test_what_is_merely_strange_is_served(run: Callable[..., None], body: bytes) -> None:
    async def scenario() -> None:
        served = Served()
        async with served.listening() as url:
            client = await Client.connect(url)
            client.send(request(COMPLETIONS, body))
            status, _, answer = await client.answer()
            assert (status, json.loads(answer)["usage"]["completion_tokens"]) == (200, 2)
            client.close()

    run(scenario())


def _chunked(body: bytes, *, size: int = 10_000) -> bytes:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def _of_size(num_bytes: int) -> bytes:
    body = completion(user="")
    return body.replace(b'"user": ""', b'"user": "' + b"u" * (num_bytes - len(body)) + b'"')


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request(COMPLETIONS, _of_size(LIMIT)), 200),
        (request(COMPLETIONS, _of_size(LIMIT + 1)), 413),
        (_chunked(_of_size(LIMIT)), 200),
        (_chunked(_of_size(LIMIT + 1)), 413),
        (request(COMPLETIONS, completion(), "content-type: application/json; charset=utf-8"), 200),
        (request(COMPLETIONS, completion(), "content-type: text/plain"), 415),
        (request(COMPLETIONS, b"prompt=a", "content-type: application/x-www-form-urlencoded"), 415),
        (request(COMPLETIONS, completion(), "content-type: "), 415),
        (b"PUT /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n", 405),
        (b"TRACE / HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (b"GET /v1/../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (b"GET /" + b"a" * 30_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 404),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nx: " + b"a" * 100_000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + b"x: a\r\n" * 50_000 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + b"x: a\r\n" * 500_000, 431),  # and no end
        (b"BREW /pot HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"GET /health HTTP/1.1\r\n: nothing\r\n\r\n", 400),
        (request(COMPLETIONS, b"{}", "content-length: 5"), 400),
        (request(COMPLETIONS, b"{}", "transfer-encoding: chunked"), 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)
def test_http_itself_may_be_wrong(run: Callable[..., None], sent: bytes, status: int) -> None:
    async def scenario() -> None:
        async with Served(max_body_bytes=LIMIT).listening() as url:
            client = await Client.connect(url)
            client.send(sent)
            answer = await client.answer()
            assert answer[0] == status
            if status != 200:
                _error(answer)
            client.close()
            await _check_alive(url)

    run(scenario())


def test_pipelined_requests_are_answered_in_their_order(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        async with Served().listening() as url:
            client = await Client.connect(url)
            sizes = [1 + n % 5 for n in range(100)]
            client.send(b"".join(request(COMPLETIONS, completion(max_tokens=size)) for size in sizes))
            answers = [json.loads((await client.answer())[2]) for _ in sizes]
            assert [answer["usage"]["completion_tokens"] for answer in answers] == sizes
            client.close()

    run(scenario())


def test_a_client_that_leaves_pipelined_requests_ends_the_one_at_work(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        served = Served()
        served.engine.gate.clear()
        async with served.listening() as url:
            client = await Client.connect(url)
            client.send(request(COMPLETIONS, completion()) * 3)
            await _until(lambda: bool(served.engine.running))
            client.close()
            await _until(lambda: not served.engine.running)
            assert len(served.engine.started) == 1
            served.engine.gate.set()
            await _check_alive(url)

    run(scenario())


def test_a_request_may_come_byte_by_byte(run: Callable[..., None]) -> None:
    async def scenario() -> None:
        async with Served().listening() as url:
            client = await Client.connect(url)
            client.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in request(COMPLETIONS, completion()):
                client.send(bytes([byte]))
                await client.writer.drain()
                await asyncio.sleep(0)
            assert (await client.answer())[0] == 200
            client.close()

    run(scenario())


@pytest.mark.parametrize("begun", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: x\r\n"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_head_that_does_not_come_is_not_waited_for(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, begun: bytes, is_first: bool
) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        async with Served().listening() as url:
            client = await Client.connect(url)
            if not is_first:
                client.send(request(COMPLETIONS, completion()))
                assert (await client.answer())[0] == 200
            client.send(begun)
            if is_first or begun:  # else uvicorn's own limit of idle connections holds
                assert await client.closed()
            client.close()
            await _check_alive(url)

    run(scenario())


@pytest.mark.parametrize(
    "sent", [b"", b"GET ", request(COMPLETIONS, b"{" * 50)[:-10], request(COMPLETIONS, completion(**LONG))]
)
def test_a_client_that_shuts_its_side_is_left(run: Callable[..., None], sent: bytes) -> None:
    async def scenario() -> None:
        served = Served()
        served.engine.gate.clear()
        async with served.listening() as url:
            client = await Client.connect(url)
            client.send(sent)
            await client.writer.drain()
            client.writer.write_eof()
            assert await client.closed()
            await _until(lambda: not served.engine.running and not served.state.admission.num_active)
            served.engine.gate.set()
            client.close()
            await _check_alive(url)

    run(scenario())


def test_five_hundred_connections_come_and_go(run: Callable[..., None]) -> None:
    async def visit(url: str, number: int) -> None:
        client = await Client.connect(url)
        client.send((b"", b"GET /he", request(COMPLETIONS, completion(**LONG)), b"\0" * 100)[number % 4])
        if number % 3 == 0:
            # Closed with a reset instead of an orderly end.
            client.writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
            )
        client.close()

    async def scenario() -> None:
        served = Served()
        async with served.listening() as url:
            for start in range(0, 500, 100):
                await asyncio.gather(*(visit(url, start + n) for n in range(100)))
            await _check_alive(url)
            await _until(lambda: not served.engine.running and not served.state.admission.num_active)

    run(scenario())


def test_clients_that_never_read_cost_little_and_hinder_nobody(run: Callable[..., None]) -> None:
    async def lazy(url: str, body: bytes) -> socket.socket:
        address = urlsplit(url)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (address.hostname, address.port))
        await loop.sock_sendall(client, request(COMPLETIONS, body))
        return client

    async def scenario() -> None:
        served = Served(send_timeout_s=0.3)
        num_bytes = 0

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            async def counting(message: Any) -> None:
                nonlocal num_bytes
                num_bytes += len(message.get("body", b""))
                await send(message)

            await served.app(scope, receive, counting)

        async with listening(counted) as url:
            body = completion(**{**LONG, "n": 128, "max_tokens": 240, "logprobs": 5})
            sockets = await asyncio.gather(*(lazy(url, body) for _ in range(2)))
            await _until(lambda: len(served.engine.started) == 2)
            await _check_alive(url)
            await _until(lambda: not served.state.admission.num_active)
            await _check_alive(url)
            for client in sockets:
                client.close()
        assert not served.engine.running
        assert not served.state.generations
        # What the kernel takes is not held up; a token with its logprobs has more than 300 bytes.
        assert num_bytes < len(sockets) * 128 * 240 * 300 / 2

    run(scenario())
