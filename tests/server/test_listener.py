"""The address that the ready line shows."""

from __future__ import annotations

import pytest
import ray
from fastapi import FastAPI

from moe_runtime import cluster
from moe_runtime.server.listener import HttpServer, listen


class _Context:
    def get_node_id(self) -> str:
        return "here"


NODES = [
    {"Alive": True, "NodeID": "elsewhere", "NodeManagerAddress": "10.0.0.1"},
    {"Alive": True, "NodeID": "here", "NodeManagerAddress": "10.0.0.2"},
]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of two nodes; this process is on the second."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: NODES)
    monkeypatch.setattr(ray, "get_runtime_context", _Context)
    monkeypatch.setattr(cluster, "_is_our_own_ray", lambda: False)


def _url(host: str, bound: str = "127.0.0.1") -> str:
    listener = listen(bound, 0)
    try:
        port = listener.getsockname()[1]
        return HttpServer(FastAPI(), listener).url(host).replace(str(port), "PORT")
    finally:
        listener.close()


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://10.0.0.2:PORT"),
        ("", "http://10.0.0.2:PORT"),
        ("::", "http://10.0.0.2:PORT"),
        ("127.0.0.1", "http://127.0.0.1:PORT"),
        ("::1", "http://[::1]:PORT"),
    ],
)
def test_on_a_joined_cluster_all_addresses_are_shown_as_the_node_s_own(host: str, url: str) -> None:
    assert _url(host) == url


@pytest.mark.usefixtures("joined")
def test_on_a_ray_of_the_command_s_own_it_is_this_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_is_our_own_ray", lambda: True)
    assert _url("0.0.0.0") == "http://127.0.0.1:PORT"


def test_without_ray_it_is_this_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert _url("0.0.0.0") == "http://127.0.0.1:PORT"
