"""A rank's sockets: tokens reach the driver that asked, and a driver that falls silent loses its requests alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from moe_runtime.request import EngineRequest, OutputDelta, SamplingParams
from moe_runtime.transport import rank_server, wire
from moe_runtime.transport.channel import Channel
from moe_runtime.transport.mailbox import Mailbox
from moe_runtime.transport.rank_server import RankServer

KEY = b"k" * 32


class _Driver:
    """The other end: what it received, in order."""

    def __init__(self, server: RankServer) -> None:
        self.channel = Channel.connect(server.address, KEY)
        self.received: list[wire.ToDriver] = []
        self.reader = threading.Thread(target=self.channel.receive, args=(self._take,), daemon=True)
        self.reader.start()

    def _take(self, data: bytes) -> None:
        self.received.append(wire.decode_to_driver(data))

    def submit(self, request_id: str) -> None:
        request = EngineRequest(
            request_id=request_id, sample_index=0, prompt_token_ids=(1,), params=SamplingParams(), seed=0
        )
        self.channel.send(wire.encode(wire.Submit.of([request])))


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox(generation=0)


@pytest.fixture
def server(mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[RankServer]:
    monkeypatch.setattr(rank_server, "LEASE_S", 0.6)
    monkeypatch.setattr(rank_server, "BEAT_INTERVAL_S", 0.1)
    made = RankServer("127.0.0.1", KEY, mailbox)
    yield made
    made.close()


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _submitted(mailbox: Mailbox, count: int) -> dict[str, str]:
    """The driver of each request that came in."""
    driver_of: dict[str, str] = {}

    def arrived() -> bool:
        driver_of.update({request.request_id: driver for driver, request, _ in mailbox.take().submitted})
        return len(driver_of) >= count

    _until(arrived)
    return driver_of


def _aborted(mailbox: Mailbox) -> list[str]:
    ids: list[str] = []

    def arrived() -> bool:
        ids.extend(mailbox.take().aborted)
        return bool(ids)

    _until(arrived)
    return ids


def test_each_driver_receives_its_own_tokens_and_no_others(server: RankServer, mailbox: Mailbox) -> None:
    drivers = [_Driver(server), _Driver(server)]
    for name, driver in zip("ab", drivers, strict=True):
        driver.submit(name)
    driver_of = _submitted(mailbox, 2)
    assert sorted(driver_of) == ["a", "b"]
    messages = [wire.Deltas([], wire.Tokens([name], [0], [i], ["text"])) for i, name in enumerate("ab")]
    for name, message in zip("ab", messages, strict=True):
        server.deliver(driver_of[name], message)
    server.deliver("one that has left", messages[0])
    for message, driver in zip(messages, drivers, strict=True):
        _until(lambda driver=driver: bool(driver.received))  # type: ignore[misc]
        assert driver.received == [message]


def test_a_silent_drivers_lease_lapses_and_aborts_its_requests_alone(
    server: RankServer, mailbox: Mailbox
) -> None:
    silent, alive = _Driver(server), _Driver(server)
    silent.submit("silent")
    alive.submit("alive")
    driver_of = _submitted(mailbox, 2)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            alive.channel.send(wire.encode(wire.Beat()))

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    assert _aborted(mailbox) == ["silent"]
    silent.reader.join(5)
    assert not silent.reader.is_alive()
    server.deliver(driver_of["alive"], wire.Deltas([OutputDelta(request_id="alive", sample_index=0)]))
    _until(lambda: bool(alive.received))
    stop.set()


def test_a_closed_connection_aborts_its_requests_at_once(server: RankServer, mailbox: Mailbox) -> None:
    driver = _Driver(server)
    driver.submit("mine")
    _submitted(mailbox, 1)
    driver.channel.close()
    assert _aborted(mailbox) == ["mine"]


def test_what_is_no_message_ends_only_that_connection(server: RankServer, mailbox: Mailbox) -> None:
    bad, good = _Driver(server), _Driver(server)
    bad.channel.send(b"\xc1 no msgpack")
    bad.reader.join(5)
    assert not bad.reader.is_alive()
    good.submit("fine")
    assert list(_submitted(mailbox, 1)) == ["fine"]


def test_a_wake_up_of_a_peer_reaches_the_mailbox(server: RankServer, mailbox: Mailbox) -> None:
    peer = RankServer("127.0.0.1", KEY, Mailbox(generation=0))
    peer.connect_peers([server.address])
    woken = threading.Thread(target=mailbox.park, args=(5, False, print), daemon=True)
    woken.start()
    peer.wake_peers(0, 5)
    woken.join(5)
    assert not woken.is_alive()
    peer.close()
