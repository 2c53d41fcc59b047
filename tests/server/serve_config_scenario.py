"""Run by test_ray_serve_config.py in a process of its own: an application from a configuration, to its end.

Serve's controller gets it as the dashboard hands it over for `serve deploy`. Says what it has seen, a line a step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx2
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

TIMEOUT_S = 300
GREEDY = {"prompt": "The experts of", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
# Serve asks every ten seconds by default, and replaces at the third time.
OFTEN = {"health_check_period_s": 1}
APPLICATION = {
    "name": "moe",
    "route_prefix": "/",
    "import_path": "moe_runtime.server.ray_serve:build",
    "args": {
        "device": "cpu",
        "dtype": "float32",
        "expert_parallel_size": 2,
        "num_replicas": 2,
        "served_model_name": ["demo", "small"],
    },
    "deployments": [{"name": "Model", **OFTEN}, {"name": "Http", **OFTEN}],
}
DEAD = {
    "message": "the model's ranks have failed and serve no requests now",
    "type": "service_unavailable",
    "param": None,
    "code": "engine_dead",
}


def main(url: str) -> None:
    port = int(url.rsplit(":", 1)[1])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    try:
        deploy([APPLICATION])
        wait("the application to run", is_running)
        accepts_the_configuration(url)
        replaces_dead_ranks(url)
        drains_when_deleted(url)
    finally:
        serve.shutdown()
        ray.shutdown()


def accepts_the_configuration(url: str) -> None:
    assert [card["id"] for card in get(url, "/v1/models")] == ["demo", "small"]
    details = serve.status().applications["moe"].deployments
    assert details["Http"].replica_states == {"RUNNING": 2}, details
    assert len(rank_pids(url)) == 2
    assert len(tokens(url)) == 12
    print("the configuration is accepted", flush=True)


def replaces_dead_ranks(url: str) -> None:
    """A stream and requests are told in OpenAI's shape; Serve finds out, and has other ranks started."""
    expected, before = tokens(url), rank_pids(url)
    stream = Stream(url, 6000)
    wait("the stream to begin", lambda: len(stream.events) > 2)
    os.kill(min(before), signal.SIGKILL)
    assert stream.last()["error"] == DEAD
    refused: list[httpx2.Response] = []

    def serves_again() -> bool:
        with suppress(httpx2.TransportError):
            answer = httpx2.post(f"{url}/v1/completions", json=GREEDY, timeout=60)
            if answer.status_code == 200:
                return True
            refused.append(answer)
        return False

    wait("the ranks to be replaced", serves_again)
    ours = [answer for answer in refused if answer.headers["content-type"].startswith("application/json")]
    assert ours, f"no replica refused a request while the ranks were dead: {refused}"
    for answer in ours:
        assert (answer.status_code, answer.json()) == (503, {"error": DEAD}), answer.text
    wait("the application to be well", is_running)
    assert not rank_pids(url) & before
    assert {tuple(tokens(url)) for _ in range(6)} == {tuple(expected)}
    print("the dead ranks are replaced", flush=True)


def drains_when_deleted(url: str) -> None:
    ranks = rank_pids(url)
    began = time.monotonic()
    httpx2.post(f"{url}/v1/completions", json={**GREEDY, "max_tokens": 200}, timeout=60).raise_for_status()
    a_second = 200 / (time.monotonic() - began)
    stream = Stream(url, min(6000, int(3 * a_second)))  # well within the ten seconds that the ranks wait
    wait("the stream to begin", lambda: len(stream.events) > 2)
    deploy([])
    assert stream.is_alive(), "it ended before the application was deleted"
    assert stream.last()["choices"][0]["finish_reason"] == "length"
    wait("the application to be gone", lambda: "moe" not in serve.status().applications)
    wait("the ranks to end", lambda: not any(os.path.exists(f"/proc/{pid}") for pid in ranks))
    assert httpx2.get(f"{url}/health", timeout=60).status_code in (404, 503)
    print("the application is drained", flush=True)


def deploy(applications: list[Any]) -> None:
    schema = ServeDeploySchema.model_validate({"applications": applications})
    _get_global_client().deploy_apps(schema, _blocking=False)


def is_running() -> bool:
    application = serve.status().applications["moe"]
    assert application.status != "DEPLOY_FAILED", application.message
    return bool(application.status == "RUNNING")


def wait(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, f"waited {TIMEOUT_S} s for {what}: {serve.status()}"
        time.sleep(0.2)


def get(url: str, path: str) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = httpx2.get(f"{url}{path}", timeout=60).json()["data"]
    return data


def rank_pids(url: str) -> set[int]:
    return {rank["pid"] for rank in get(url, "/v1/ranks")}


def tokens(url: str) -> list[int]:
    answer = httpx2.post(f"{url}/v1/completions", json={**GREEDY, "return_token_ids": True}, timeout=60)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


class Stream(threading.Thread):
    """A completion that is read as it comes."""

    def __init__(self, url: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._body = {**GREEDY, "max_tokens": max_tokens, "stream": True}
        self.events: list[str] = []
        self.start()

    def run(self) -> None:
        post = httpx2.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=TIMEOUT_S)
        with post as response:
            for line in response.iter_lines():
                if line:
                    self.events.append(line.removeprefix("data: "))

    def last(self) -> Any:
        """The last event; a mark of the end stands behind it unless it is an error."""
        self.join(TIMEOUT_S)
        assert not self.is_alive(), f"the stream goes on; last {self.events[-1:]}"
        *_, event = (json.loads(data) for data in self.events if data != "[DONE]")
        assert ("error" in event) != (self.events[-1] == "[DONE]")
        return event


if __name__ == "__main__":
    main(sys.argv[1])
