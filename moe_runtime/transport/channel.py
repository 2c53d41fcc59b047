"""An authenticated message channel over TCP: whole messages in both directions, from several threads."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import socket
import threading
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from moe_runtime.errors import ChannelError

# A peer that connects and does not prove within this time that it knows the key is dropped.
_HANDSHAKE_S = 10.0
_MAX_MESSAGE_BYTES = 1 << 30


class Channel:
    """One end of a connection. `send` never waits: a thread of the channel's own writes.

    Both ends prove that they know the deployment's key (the HMAC challenge of `multiprocessing.connection`)
    before anything else is read.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outbox: deque[bytes] = deque()
        self._has_mail = threading.Condition()
        self._closed = False
        threading.Thread(target=self._write, name="channel-writer", daemon=True).start()

    @classmethod
    def accept(cls, connected: socket.socket, key: bytes) -> Channel:
        """The listening side's end of a fresh connection.

        Raises:
            ChannelError: the peer does not know the key, or does not answer.
        """
        return cls._handshake(connected, key, listening=True)

    @classmethod
    def connect(cls, address: tuple[str, int], key: bytes, timeout_s: float = _HANDSHAKE_S) -> Channel:
        """Connect to a listener.

        Raises:
            ChannelError: nobody listens there, or the key is not the listener's.
        """
        try:
            connected = socket.create_connection(address, timeout_s)
        except OSError as error:
            raise ChannelError(f"cannot connect to {address[0]}:{address[1]}: {error}") from error
        return cls._handshake(connected, key, listening=False)

    @classmethod
    def _handshake(cls, connected: socket.socket, key: bytes, *, listening: bool) -> Channel:
        # Closing the socket from a timer is what ends a handshake with a peer that says nothing.
        connected.settimeout(None)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        timer = threading.Timer(_HANDSHAKE_S, lambda: _shut(connected))
        timer.start()
        steps = [deliver_challenge, answer_challenge]
        duplicate = Connection(socket.dup(connected.fileno()))
        try:
            for step in steps if listening else reversed(steps):
                step(duplicate, key)
        except (OSError, EOFError, mp.AuthenticationError, AssertionError) as error:
            duplicate.close()
            raise ChannelError(
                f"the peer did not prove that it knows the deployment's key: {error}"
            ) from error
        finally:
            timer.cancel()
            connected.close()
        return cls(duplicate)

    def send(self, message: bytes) -> None:
        """Queue a message; dropped silently once the channel is closed."""
        with self._has_mail:
            if not self._closed:
                self._outbox.append(message)
                self._has_mail.notify()

    def receive(self, on_message: Callable[[bytes], None]) -> None:
        """Hand every message to `on_message` until either end closes; then close this end."""
        try:
            while True:
                on_message(self._connection.recv_bytes(_MAX_MESSAGE_BYTES))
        except (OSError, EOFError):
            pass  # the peer has gone, or `close` was called here
        finally:
            self.close()

    def close(self) -> None:
        """Close both directions; what is queued is lost. Safe to call again, from any thread."""
        with self._has_mail:
            if self._closed:
                return
            self._closed = True
            self._has_mail.notify()
        # A thread that reads must be woken before the descriptor goes.
        with contextlib.suppress(OSError), socket.socket(fileno=socket.dup(self._connection.fileno())) as s:
            s.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        while True:
            with self._has_mail:
                self._has_mail.wait_for(lambda: self._outbox or self._closed)
                if self._closed:
                    break
                message = self._outbox.popleft()
            try:
                self._connection.send_bytes(message)
            except OSError:
                self.close()


def _shut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
