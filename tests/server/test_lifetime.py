"""From the ready line to the end: by signals, and by the engine's own end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from moe_runtime.errors import MoeRuntimeError, RankFailedError
from moe_runtime.metrics.deployment_metrics import DeploymentMetrics
from moe_runtime.server import lifetime
from moe_runtime.server.app import make_app
from moe_runtime.server.lifetime import serve_until_stopped
from moe_runtime.server.listener import HttpServer, listen
from tests.server.fake_engine import FakeEngine, server_config

BODY = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}


class EndingEngine(FakeEngine):
    """Begins something of its own once the server serves it."""

    def __init__(self, begin: Callable[[Callable[[MoeRuntimeError | None], None]], None]) -> None:
        super().__init__()
        self._begin = begin

    def on_end(self, callback: Callable[[MoeRuntimeError | None], None]) -> None:
        threading.Thread(target=self._begin, args=(callback,)).start()


def _serve(engine: Any, http: HttpServer, state: Any) -> None:
    metrics = DeploymentMetrics(list, model_name="demo")
    serve_until_stopped(engine, metrics, state, http, ready_line="ready", shutdown_timeout_s=30)


def test_the_end_of_the_engine_ends_the_server_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    engine = EndingEngine(lambda ended: ended(RankFailedError("rank 1 died")))
    app = make_app(None, server_config())
    with (
        HttpServer(app, listen("127.0.0.1", 0)) as http,
        pytest.raises(RankFailedError, match="rank 1 died"),
    ):
        _serve(engine, http, app.state.server)
    assert capsys.readouterr().out == "ready\n"


def test_a_second_signal_aborts_what_the_first_would_finish() -> None:
    statuses: list[int] = []

    def post() -> None:
        statuses.append(httpx2.post(f"{url}/v1/completions", json=BODY, timeout=30).status_code)

    def interrupt_twice(ended: Callable[[MoeRuntimeError | None], None]) -> None:
        client.start()
        for is_time in (lambda: bool(engine.running), lambda: state.admission.is_closed):
            while not is_time():
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGINT)

    client = threading.Thread(target=post)
    engine = EndingEngine(interrupt_twice)
    engine.gate.clear()
    app = make_app(None, server_config())
    state = app.state.server
    with HttpServer(app, listen("127.0.0.1", 0)) as http:
        url = http.url("127.0.0.1")
        _serve(engine, http, state)
        assert engine.aborted == engine.started
    client.join()
    assert statuses == [503]


@pytest.mark.parametrize(("worth_saying_s", "is_said"), [(0.0, True), (30.0, False)])
def test_what_is_finished_at_once_is_not_worth_a_line(
    worth_saying_s: float, is_said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifetime, "_WORTH_SAYING_S", worth_saying_s)
    said: list[str] = []

    def interrupt(ended: Callable[[MoeRuntimeError | None], None]) -> None:
        client.start()
        while not engine.running:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)
        while not (said if is_said else state.admission.is_closed):
            time.sleep(0.005)
        http.call_soon(engine.gate.set)

    monkeypatch.setattr(lifetime, "_say", said.append)
    engine = EndingEngine(interrupt)
    engine.gate.clear()
    app = make_app(None, server_config())
    state = app.state.server
    with HttpServer(app, listen("127.0.0.1", 0)) as http:
        url = f"{http.url('127.0.0.1')}/v1/completions"
        client = threading.Thread(target=lambda: httpx2.post(url, json=BODY, timeout=30))
        _serve(engine, http, state)
    client.join()
    line = "finishing 1 requests within 30 s; Ctrl-C again aborts them"
    assert said == ([line] if is_said else [])
