"""`moe-runtime chat` and `complete` where no server answers: they have one of their own while they run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from moe_runtime.cli import client_args, own_server
from moe_runtime.cli.main import build_parser, main
from tests.runtime.cluster.program import Program, running
from tests.runtime.openai_stub import chat_chunks, openai_stub
from tests.source_tree import package_folders

SERVER = Path(__file__).parent / "serving_program.py"


@dataclass
class Server:
    """The stand-in that would be started."""

    log: Path

    def command(self, how: str) -> list[str]:
        return [sys.executable, str(SERVER), str(self.log), how]

    @property
    def was_started(self) -> bool:
        return self.log.exists()

    @property
    def signals(self) -> list[str]:
        """That it got."""
        return self.log.read_text().split()[1:]

    def assert_ended(self) -> None:
        """As asked, once, and waited for."""
        assert self.signals == ["SIGTERM"]
        assert not psutil.pid_exists(int(self.log.read_text().split()[0]))


@pytest.fixture
def closed_url(monkeypatch: pytest.MonkeyPatch) -> str:
    """The default address, where nobody answers."""
    with openai_stub() as stub:
        pass
    monkeypatch.setattr(client_args, "_DEFAULT_BASE_URL", stub.base_url)
    return stub.base_url


@pytest.fixture
def serve(tmp_path: Path, closed_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Server]:
    """Has a stand-in take the place of `moe-runtime serve`."""
    for name in client_args.KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, package_folders())))

    def stand_in(how: str) -> Server:
        server = Server(tmp_path / "log")
        monkeypatch.setattr(own_server, "_command", lambda model: server.command(how))
        return server

    return stand_in


@pytest.mark.parametrize(
    ("argv", "how", "answer"),
    [
        (["chat", "--message", "Hi"], "chats", "Hello\n"),
        (["complete", "--prompt", "The experts"], "completes", " of old\n"),
        (["chat", "--message", "Hi", "--api-key", "secret"], "chats", "Hello\n"),
    ],
)
def test_where_nobody_answers_a_server_is_started_and_ended(
    argv: list[str],
    how: str,
    answer: str,
    serve: Callable[[str], Server],
    closed_url: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = serve(how)
    assert main(argv) == 0
    said = capsys.readouterr()
    assert said.out == answer
    assert said.err == (
        f"moe-runtime: no server answers at {closed_url}; starting one for the demo checkpoint\n"
        "a line of some rank\n"
    )
    server.assert_ended()


def test_the_model_is_the_one_that_is_named(
    serve: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, asked = serve("chats"), list[str | None]()
    monkeypatch.setattr(own_server, "_command", lambda model: asked.append(model) or server.command("chats"))
    assert main(["chat", "--model", "some/model", "--message", "Hi"]) == 0
    assert asked == ["some/model"]
    assert "; starting one for some/model\n" in capsys.readouterr().err


@pytest.mark.parametrize("model", [None, "some/model"])
def test_the_command_is_one_of_this_host_on_a_free_port(model: str | None) -> None:
    python, *module = own_server._command(model)[:3]
    assert (python, module) == (sys.executable, ["-m", "moe_runtime"])
    args = build_parser().parse_args(own_server._command(model)[3:])
    assert (args.command, args.model, args.host, args.port) == ("serve", model, "127.0.0.1", 0)


def test_a_server_that_answers_is_asked(
    serve: Callable[[str], Server], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve("chats")
    with openai_stub([chat_chunks("from it")]) as stub:
        monkeypatch.setattr(client_args, "_DEFAULT_BASE_URL", stub.base_url)
        assert main(["chat", "--message", "Hi"]) == 0
    assert capsys.readouterr() == ("from it\n", "")
    assert not server.was_started


def test_with_a_base_url_none_is_started(
    serve: Callable[[str], Server], closed_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve("chats")
    assert main(["chat", "--base-url", closed_url, "--message", "Hi"]) == 1
    assert "start one with `moe-runtime serve`" in capsys.readouterr().err
    assert not server.was_started


def test_an_error_ends_it(serve: Callable[[str], Server], capsys: pytest.CaptureFixture[str]) -> None:
    server = serve("refuses")
    assert main(["chat", "--message", "Hi"]) == 1
    assert "answers 400: no\n" in capsys.readouterr().err
    server.assert_ended()


@pytest.mark.parametrize(
    ("code", "status", "seen"),
    [
        ("import sys; print('moe-runtime: error: no such checkpoint', file=sys.stderr); sys.exit(2)", 2, 2),
        ("import os; os.kill(os.getpid(), 9)", 1, -9),
        ("pass", 1, 0),
    ],
)
def test_one_that_ends_at_its_start_is_one_line_and_its_status(
    code: str,
    status: int,
    seen: int,
    closed_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(own_server, "_command", lambda model: [sys.executable, "-c", code])
    assert main(["complete", "--model", "nowhere", "--prompt", "Hi"]) == status
    assert capsys.readouterr().err.splitlines() == [
        f"moe-runtime: no server answers at {closed_url}; starting one for nowhere",
        f"moe-runtime: ServerError: the server for nowhere ended with status {seen} before it was ready",
    ]


def test_one_that_is_not_ready_in_time_is_ended(
    closed_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[subprocess.Popen[str]] = []

    def start(command: list[str], api_key: str | None) -> subprocess.Popen[str]:
        started.append(really_start([sys.executable, "-c", "import time; time.sleep(60)"], api_key))
        return started[-1]

    really_start = own_server._start
    monkeypatch.setattr(own_server, "_start", start)
    monkeypatch.setattr(own_server, "_START_LIMIT_S", 0.2)
    assert main(["chat", "--message", "Hi"]) == 1
    error = capsys.readouterr().err
    assert (
        "the server for the demo checkpoint was not ready within 0.2 s; start it with `moe-runtime" in error
    )
    assert started[0].returncode == -signal.SIGTERM


def _client(closed_url: str, *argv: str, patch: str = "") -> list[str]:
    """Python's arguments for a `moe-runtime` whose default address is `closed_url`."""
    program = (
        "import sys\n"
        "from moe_runtime.cli import client_args, own_server\n"
        "from moe_runtime.cli.main import main\n"
        f"client_args._DEFAULT_BASE_URL = {closed_url!r}\n{patch}\n"
        "sys.exit(main())"
    )
    return ["-c", program, *argv]


def _interrupt(program: Program) -> None:
    program.interrupt()


def _terminate(program: Program) -> None:
    program.signal(signal.SIGTERM)


def _kill(program: Program) -> None:
    program.signal(signal.SIGKILL)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux'")
every_end = pytest.mark.parametrize(
    ("end", "status"),
    [
        (_interrupt, 130),
        (_terminate, 128 + signal.SIGTERM),
        pytest.param(_kill, -signal.SIGKILL, marks=on_linux),
    ],
)


@every_end
def test_a_signal_to_the_client_ends_it(
    end: Callable[[Program], None], status: int, tmp_path: Path, closed_url: str
) -> None:
    server = Server(tmp_path / "log")
    patch = f"own_server._command = lambda model: {server.command('never ends')!r}"
    with running(tmp_path, _client(closed_url, "chat", "--message", "Hi", patch=patch)) as program:
        program.wait_for("begun")
        end(program)
        assert program.finish() == status
        program.assert_left_nothing()
    # The kernel tells it of the death of each thread of a client that is killed.
    assert set(server.signals) == {"SIGTERM"}


@pytest.mark.slow
@pytest.mark.ray
def test_the_demo_completes_a_text_with_no_server_and_leaves_nothing(tmp_path: Path, closed_url: str) -> None:
    flags = ("--prompt", "The experts", "--max-tokens", "8", "--ignore-eos", "--temperature", "0")
    with running(tmp_path, _client(closed_url, "complete", *flags)) as program:
        program.succeed()
        assert len(program.stdout.split()) > 1
        assert f"no server answers at {closed_url}; starting one for the demo checkpoint\n" in program.stderr
        program.assert_left_nothing()


@pytest.mark.slow
@pytest.mark.ray
@every_end
def test_a_signal_while_the_demo_starts_leaves_nothing(
    end: Callable[[Program], None], status: int, tmp_path: Path, closed_url: str
) -> None:
    with running(tmp_path, _client(closed_url, "chat", "--message", "Hi")) as program:
        client = psutil.Process(program.pid)
        program.wait_until(
            "Ray has started", lambda: any(p.name() == "raylet" for p in client.children(recursive=True))
        )
        end(program)
        assert program.finish() == status
        # A signal waits for the end of Ray's start.
        program.assert_left_nothing(timeout_s=60)
