"""Whether anything listens at an address."""

from __future__ import annotations

import socket


def accepts_connections(host: str | None, port: int | None, timeout_s: float) -> bool:
    """Whether a TCP connection is accepted in that time; no for what is no address."""
    try:
        socket.create_connection((host, port), timeout_s).close()
    except (OSError, OverflowError):
        return False
    return True
