"""Joining Ray: addresses that lead nowhere are noticed at once, and Ctrl-C waits until Ray can be ended."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_runtime import connecting
from moe_runtime.errors import ConfigError, RayStartError
from moe_runtime.signals import exit_on_signal


@pytest.fixture
def closed_port() -> int:
    """Nothing listens there."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def _left_behind(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connecting, "get_ray_address_from_environment", lambda *args: address)


def test_an_address_that_a_killed_head_left_behind_is_no_cluster(
    closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _left_behind(f"127.0.0.1:{closed_port}", monkeypatch)
    assert connecting._find_cluster() is None


def test_an_address_where_something_listens_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        _left_behind(address, monkeypatch)
        assert connecting._find_cluster() == address


@pytest.mark.parametrize(
    ("found", "wanted"), [(None, None), ("local", None), ("ray://head:10001", "ray://head:10001")]
)
def test_what_is_no_host_and_port_is_left_to_ray(
    found: str | None, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _left_behind(found, monkeypatch)
    assert connecting._find_cluster() == wanted


def test_an_address_of_the_user_that_leads_nowhere_is_refused_at_once(
    closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{closed_port}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(
        ConfigError, match=rf"no Ray cluster answers at RAY_ADDRESS='{address}'; start one there"
    ):
        connecting._find_cluster()
    assert time.monotonic() - began < 2 * connecting._ANSWERS_WITHIN_S


def test_what_ray_raises_while_it_starts_comes_out_as_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise Exception("The current node timed out during startup.\nmore")  # as Ray does, bare

    ended: list[str] = []
    monkeypatch.setattr(connecting.ray, "init", init)
    # What began is ended; not in earnest, as other tests of this process may have a Ray.
    monkeypatch.setattr(connecting.ray, "shutdown", lambda: ended.append("ray"))
    with pytest.raises(
        RayStartError, match=r"^Ray did not start \(local\): The current node timed out"
    ) as raised:
        connecting._init_ray("local")
    assert "\n" not in str(raised.value)
    assert ended == ["ray"]


def test_ray_is_started_by_a_thread_that_lives_on_after_its_caller() -> None:
    """Linux kills Ray's servers with the thread that has started them."""
    called_in: list[threading.Thread] = []

    def start() -> None:
        connecting._call_for_good(lambda: called_in.append(threading.current_thread()))

    start()
    callers = [threading.Thread(target=start) for _ in range(2)]
    for caller in callers:
        caller.start()
        caller.join()
    in_main, first, second = called_in
    assert in_main is threading.main_thread()
    assert first is second
    assert first not in callers
    assert first.is_alive()
    assert first.daemon  # it does not keep the process


def test_what_fails_in_that_thread_fails_for_the_caller() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(ConnectionError, match="the head is gone"):
        pool.submit(connecting._call_for_good, _fail).result()


@pytest.mark.parametrize("by_user", [True, False])
def test_a_cluster_that_lets_nobody_in_is_told_from_none(
    by_user: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: list[str | None] = []

    def init(address: str | None, **options: object) -> None:
        addresses.append(address)
        raise ConnectionError("ray client connection timeout")

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if by_user:
            monkeypatch.setenv("RAY_ADDRESS", address)
        else:
            _left_behind(address, monkeypatch)
        monkeypatch.setattr(connecting.ray, "is_initialized", lambda: False)
        monkeypatch.setattr(connecting.ray, "init", init)
        monkeypatch.setattr(connecting.ray, "shutdown", lambda: None)
        with pytest.raises(ConfigError, match=rf"something listens at {address}.* RAY_AUTH_MODE must be"):
            connecting.ensure_ray(must_outlive_us=not by_user)
    assert addresses == [None]  # Ray shows its token only to a cluster that it finds itself


def _interrupted(times: int, then: Callable[[], None], by: signal.Signals = signal.SIGINT) -> None:
    """Get a signal so many times where signals wait, and go on."""
    with connecting._signals_wait():
        for _ in range(times):
            os.kill(os.getpid(), by)
        then()


def _fail() -> None:
    raise ConnectionError("the head is gone")


def test_a_first_interrupt_waits_for_the_end_of_the_context() -> None:
    handler = signal.getsignal(signal.SIGINT)
    reached: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        _interrupted(1, lambda: reached.append("the end"))
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_interrupt_is_not_lost_with_an_error() -> None:
    with pytest.raises(KeyboardInterrupt):
        _interrupted(1, _fail)


def test_a_second_interrupt_comes_at_once() -> None:
    reached: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        _interrupted(2, lambda: reached.append("the end"))
    assert reached == []


@pytest.mark.parametrize("before", [signal.SIG_DFL, exit_on_signal])
def test_sigterm_waits_however_often_it_comes(before: Callable[..., object] | signal.Handlers) -> None:
    handler, reached = signal.signal(signal.SIGTERM, before), list[str]()
    try:
        with pytest.raises(SystemExit) as ended:
            _interrupted(3, lambda: reached.append("the end"), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is exit_on_signal
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert (ended.value.code, reached) == (128 + signal.SIGTERM, ["the end"])


def test_an_ignored_sigterm_stays_ignored() -> None:
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        _interrupted(1, lambda: None, signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_other_threads_leave_the_handler_alone() -> None:
    seen = []

    def enter() -> None:
        with connecting._signals_wait():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
