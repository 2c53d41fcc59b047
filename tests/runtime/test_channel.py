"""The channel between drivers and ranks: whole messages, in order, only for those who know the key."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from moe_runtime.errors import ChannelError
from moe_runtime.request import EngineRequest, Logprob, OutputDelta, SamplingParams
from moe_runtime.transport import channel as channel_module
from moe_runtime.transport import wire
from moe_runtime.transport.channel import Channel

KEY = b"k" * 32


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def _accept(listener: socket.socket, results: list[Channel | ChannelError]) -> threading.Thread:
    def run() -> None:
        connected, _ = listener.accept()
        try:
            results.append(Channel.accept(connected, KEY))
        except ChannelError as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _connected(listener: socket.socket) -> tuple[Channel, Channel]:
    results: list[Channel | ChannelError] = []
    thread = _accept(listener, results)
    client = Channel.connect(listener.getsockname(), KEY)
    thread.join(5)
    server = results[0]
    assert isinstance(server, Channel)
    return client, server


def test_messages_arrive_whole_and_in_order_in_both_directions(listener: socket.socket) -> None:
    client, server = _connected(listener)
    sent = [bytes([i % 256]) * (i * 997) for i in range(200)]
    received: dict[str, list[bytes]] = {"client": [], "server": []}
    readers = [
        threading.Thread(target=client.receive, args=(received["client"].append,)),
        threading.Thread(target=server.receive, args=(received["server"].append,)),
    ]
    for reader in readers:
        reader.start()
    for message in sent:
        client.send(message)
        server.send(message)
    deadline = time.monotonic() + 20
    while any(len(got) < len(sent) for got in received.values()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    client.close()
    for reader in readers:
        reader.join(5)
        assert not reader.is_alive()
    assert received["client"] == received["server"] == sent


def test_a_peer_without_the_key_is_refused_on_both_sides(listener: socket.socket) -> None:
    results: list[Channel | ChannelError] = []
    thread = _accept(listener, results)
    with pytest.raises(ChannelError, match="did not prove that it knows the deployment's key"):
        Channel.connect(listener.getsockname(), b"w" * 32)
    thread.join(5)
    assert isinstance(results[0], ChannelError)


def test_a_peer_that_says_nothing_is_dropped(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "_HANDSHAKE_S", 0.2)
    results: list[Channel | ChannelError] = []
    thread = _accept(listener, results)
    with socket.create_connection(listener.getsockname()):
        thread.join(5)
    assert isinstance(results[0], ChannelError)


def test_nobody_listening_is_a_clear_error(listener: socket.socket) -> None:
    address = listener.getsockname()
    listener.close()
    with pytest.raises(ChannelError, match=r"cannot connect to 127\.0\.0\.1:"):
        Channel.connect(address, KEY)


def test_close_ends_a_reader_of_either_side(listener: socket.socket) -> None:
    client, server = _connected(listener)
    readers = [threading.Thread(target=end.receive, args=(print,)) for end in (client, server)]
    for reader in readers:
        reader.start()
    server.close()
    server.close()
    server.send(b"dropped")
    for reader in readers:
        reader.join(5)
        assert not reader.is_alive()


def test_requests_and_deltas_survive_the_wire() -> None:
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[3], logit_bias={5: 1.5}, n=2, seed=3)
    request = EngineRequest(
        request_id="r",
        sample_index=1,
        prompt_token_ids=(1, 2),
        params=params,
        seed=2**63 - 1,
        eos_token_ids=(9,),
    )
    submitted = wire.decode_to_rank(wire.encode(wire.Submit.of([request])))
    assert isinstance(submitted, wire.Submit)
    assert submitted.engine_requests() == [request]
    delta = OutputDelta(
        request_id="r",
        sample_index=1,
        new_token_ids=(4, 5),
        text="\u20ac",
        logprobs=({4: Logprob(-0.5, 1, "x")}, {5: Logprob(-1.5, 2, None)}),
        prompt_logprobs=[None, {2: Logprob(-3.0, 7, "y")}],
        cumulative_logprob=-2.0,
        finish_reason="stop",
        stop_reason="a",
    )
    received = wire.decode_to_driver(wire.encode(wire.Deltas([delta])))
    assert received == wire.Deltas([delta])


def test_columns_of_tokens_come_out_as_a_delta_each() -> None:
    other = OutputDelta(request_id="c", sample_index=0, finish_reason="abort")
    message = wire.Deltas([other], wire.Tokens(["a", "b"], [0, 2], [7, 8], ["x", ""]))
    received = wire.decode_to_driver(wire.encode(message))
    assert isinstance(received, wire.Deltas)
    assert received.all() == [
        other,
        OutputDelta(request_id="a", sample_index=0, new_token_ids=(7,), text="x"),
        OutputDelta(request_id="b", sample_index=2, new_token_ids=(8,)),
    ]
