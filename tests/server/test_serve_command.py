"""`moe-runtime serve`: its flags, what it refuses before it starts anything, its life from start to signal."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from moe_runtime.cli.main import build_parser, main
from moe_runtime.cli.serve import _server_config
from moe_runtime.server.config import ServerConfig
from tests.runtime.cluster.program import running
from tests.source_tree import package_folders


def _config(*argv: str) -> ServerConfig:
    return _server_config(build_parser().parse_args(["serve", *argv]))


def test_flags_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, template = tmp_path / "keys", tmp_path / "template.jinja"
    keys.write_text("second\n\n third \n")
    template.write_text("{{ messages }}")
    monkeypatch.setenv("MOE_RUNTIME_API_KEY", "fourth")
    config = _config(
        "some/model",
        *("--served-model-name", "a", "b"),
        *("--api-key", "first", "--api-key-file", str(keys)),
        *("--allowed-origins", "https://a.example"),
        *("--chat-template", str(template)),
        *("--max-body-bytes", "5000000", "--max-concurrent-requests", "3", "--max-logprobs", "5"),
        *("--max-stop-strings", "4", "--request-timeout", "0"),
    )
    assert config == ServerConfig(
        served_model_names=("a", "b"),
        model_root="some/model",
        api_keys=("first", "second", "third", "fourth"),
        allowed_origins=("https://a.example",),
        chat_template="{{ messages }}",
        max_body_bytes=5_000_000,
        max_concurrent_requests=3,
        max_logprobs=5,
        max_stop=4,
        request_timeout_s=None,
    )


def test_without_flags_the_demo_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_RUNTIME_API_KEY", raising=False)
    assert _config() == ServerConfig(served_model_names=("demo",), model_root="demo")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--port", "99999999"], "cannot listen on --port 99999999"),
        (["--host", "no.such.host.invalid"], "cannot listen on"),
        (["--api-key-file", "/nowhere"], "cannot read --api-key-file /nowhere"),
        (["--chat-template", "/nowhere"], "cannot read --chat-template /nowhere"),
        (["--ssl-certfile", "/nowhere"], "--ssl-certfile to name a file, got '/nowhere'"),
        (["--max-num-seqs", "0"], "max_num_seqs must be a whole number of at least 1"),
        (["--connect", "prod", "--max-num-seqs", "4"], "leave out MODEL"),
        (["--max-body-bytes", "0"], "max_body_bytes"),
        (["--ingress", "serve", "--num-replicas", "0"], "--num-replicas must be at least 1, got 0"),
        (["--ingress", "serve", "--ray-metrics"], "--ray-metrics is for --ingress uvicorn"),
        (["--ingress", "serve", "--shutdown-timeout", "5"], "--shutdown-timeout is for --ingress uvicorn"),
        (
            ["--ingress", "serve", "--uvicorn-log-level", "info"],
            "--uvicorn-log-level is for --ingress uvicorn",
        ),
        (["--num-replicas", "1"], "--num-replicas is for --ingress serve"),
        (["--ingress", "serve", "--port", "0"], "--port 0 takes a free port"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout must be at least 0"),
        (["--served-model-nam", "x"], "did you mean '--served-model-name'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_runtime.cli.serve._start_engine", lambda args: pytest.fail("it was started"))
    try:
        status = main(["serve", *argv])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    assert words in capsys.readouterr().err


def test_a_port_in_use_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_runtime.cli.serve._start_engine", lambda args: pytest.fail("it was started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--host", "127.0.0.1", "--port", str(port)]) == 2
    assert f"--port {port}: " in capsys.readouterr().err


def _serve(*flags: str) -> list[str]:
    """Python's arguments for `moe-runtime serve` of this checkout."""
    program = f"import sys; sys.path[:0] = {list(map(str, package_folders()))!r}\n"
    program += "from moe_runtime.cli.main import main\nsys.exit(main())"
    return ["-c", program, "serve", "--host", "127.0.0.1", *flags]


@pytest.mark.slow
@pytest.mark.ray
def test_ray_serve_has_replicas_that_share_the_ranks_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, package_folders())))  # for the replicas
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    flags = ("--ingress", "serve", "--num-replicas", "2", "--port", port, "--dtype", "float32")
    with running(tmp_path, _serve(*flags)) as program:
        program.wait_for("serving demo at ")
        url = f"http://127.0.0.1:{port}"
        body = {"prompt": "The experts", "max_tokens": 8, "temperature": 0}
        texts = {
            httpx2.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
            for _ in range(8)
        }
        assert len(texts) == 1
        with httpx2.stream(
            "POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=60
        ) as response:
            assert [*filter(None, response.iter_lines())][-1] == "data: [DONE]"
        assert httpx2.get(f"{url}/health", timeout=60).status_code == 200
        assert httpx2.post(f"{url}/v1/completions", json={"prompt": "a", "n": 0}).status_code == 400
        program.signal(signal.SIGTERM)
        assert program.finish() == 0
        program.assert_left_nothing()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, _serve("--port", "0")) as program:
        program.wait_for("serving demo at ")
        (line,) = program.stdout.splitlines()
        url = line.split(" at ")[1]
        body = {"prompt": "The experts", "max_tokens": 40, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            first = next(lines)
            program.signal(number)
            rest = [first, *lines]
        assert "data: [DONE]" in rest
        assert program.finish() == 0
        program.assert_left_nothing()


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_rank_ends_it_with_status_1_and_leaves_nothing(tmp_path: Path) -> None:
    with running(
        tmp_path, _serve("--port", "0", "--expert-parallel-size", "2", "--device", "cpu")
    ) as program:
        program.wait_for("serving demo at ")
        url = program.stdout.splitlines()[0].split(" at ")[1]
        ranks = httpx2.get(f"{url}/v1/ranks", timeout=60).json()["data"]
        os.kill(ranks[1]["pid"], signal.SIGKILL)
        assert program.finish() == 1
        assert "RankFailedError: rank 1 (node " in program.stderr
        program.assert_left_nothing()


@pytest.mark.parametrize(
    "statement", ["import moe_runtime", "import moe_runtime.cli.main", "import moe_runtime.llm"]
)
def test_nothing_but_the_server_imports_its_libraries(statement: str) -> None:
    program = f"import sys; {statement}; print(*({{'fastapi', 'uvicorn', 'pydantic'}} & set(sys.modules)))"
    if "llm" in statement:  # Ray itself imports pydantic
        program = program.replace(", 'pydantic'", "")
    output = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, package_folders()))},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert output.stdout.split() == []
