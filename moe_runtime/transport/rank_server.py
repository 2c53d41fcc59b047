"""RankServer: the sockets of one rank. Drivers bring requests and take tokens; peers bring wake-ups."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterable

import msgspec

from moe_runtime.errors import ChannelError, UserError
from moe_runtime.transport import wire
from moe_runtime.transport.channel import Channel
from moe_runtime.transport.mailbox import Mailbox

logger = logging.getLogger(__name__)

# A driver that has said nothing for this long is gone, even if its connection still stands.
LEASE_S = 30.0
BEAT_INTERVAL_S = 5.0


class RankServer:
    """Listens on the node's address at a free port until `close`."""

    def __init__(self, node_ip: str, key: bytes, mailbox: Mailbox) -> None:
        self._key = key
        self._mailbox = mailbox
        self._drivers: dict[str, Channel] = {}
        self._last_heard: dict[str, float] = {}
        self._driver_of_request: dict[str, str] = {}
        self._lock = threading.Lock()
        self._num_connections = 0
        self._peers: list[Channel] = []
        family = socket.AF_INET6 if ":" in node_ip else socket.AF_INET
        self._listener = socket.create_server((node_ip, 0), family=family, backlog=128)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._closing = threading.Event()
        threading.Thread(target=self._accept, name="rank-accept", daemon=True).start()
        threading.Thread(target=self._watch_leases, name="rank-leases", daemon=True).start()

    def connect_peers(self, addresses: Iterable[tuple[str, int]]) -> None:
        """Open a channel for wake-ups to every other rank.

        Raises:
            ChannelError: one of them cannot be reached.
        """
        self._peers = [Channel.connect(address, self._key) for address in addresses]

    def wake_peers(self, generation: int, step: int) -> None:
        """Tell every other rank to leave the parking after agreement `step`."""
        message = wire.encode(wire.Wake(generation, step))
        for peer in self._peers:
            peer.send(message)

    def deliver(self, driver: str, message: wire.Deltas) -> None:
        """Send pieces of output to the driver that asked for them; dropped if it has left."""
        if channel := self._drivers.get(driver):
            channel.send(wire.encode(message))

    def refuse(self, driver: str, refused: wire.Refused) -> None:
        """Tell a driver that its request cannot be taken."""
        if channel := self._drivers.get(driver):
            channel.send(wire.encode(refused))

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests have ended with all their samples: nothing more will be delivered for them."""
        with self._lock:
            for request_id in request_ids:
                self._driver_of_request.pop(request_id, None)

    def close(self) -> None:
        """Stop listening and close every connection."""
        self._closing.set()
        self._listener.close()
        for channel in [*self._drivers.values(), *self._peers]:
            channel.close()

    # ------------------------------------------------------------------- threads

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connected, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connected,), name="rank-reader", daemon=True).start()

    def _serve(self, connected: socket.socket) -> None:
        """One connection, from its handshake to its end."""
        try:
            channel = Channel.accept(connected, self._key)
        except ChannelError as error:
            logger.warning("refused a connection: %s", error)
            return
        with self._lock:
            self._num_connections += 1
            driver = f"connection-{self._num_connections}"
            self._drivers[driver] = channel
        try:
            channel.receive(lambda data: self._handle(driver, data))
        except (msgspec.MsgspecError, UserError) as error:
            logger.warning("%s sent what is no valid message and was cut off: %s", driver, error)
        finally:
            channel.close()
            self._depart(driver)

    def _handle(self, driver: str, data: bytes) -> None:
        message = wire.decode_to_rank(data)
        if not isinstance(message, wire.Wake):  # a peer has no lease: it may have nothing to say for days
            self._last_heard[driver] = time.monotonic()
        if isinstance(message, wire.Submit):
            requests = message.engine_requests()
            with self._lock:
                self._driver_of_request.update((request.request_id, driver) for request in requests)
            self._mailbox.submit(driver, requests)
        elif isinstance(message, wire.Abort):
            self._mailbox.abort(message.request_ids)
        elif isinstance(message, wire.Wake):
            self._mailbox.wake(message.generation, message.step)

    def _depart(self, driver: str) -> None:
        with self._lock:
            self._drivers.pop(driver, None)
            self._last_heard.pop(driver, None)
            requests = [r for r, owner in self._driver_of_request.items() if owner == driver]
            for request in requests:
                del self._driver_of_request[request]
        if requests:
            self._mailbox.abort(requests)

    def _watch_leases(self) -> None:
        """Close the connections of drivers that beat no more: a host that vanished leaves its socket standing."""
        while not self._closing.wait(BEAT_INTERVAL_S):
            oldest = time.monotonic() - LEASE_S
            with self._lock:
                expired = [self._drivers[d] for d, heard in self._last_heard.items() if heard < oldest]
            for channel in expired:
                channel.close()
