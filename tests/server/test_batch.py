"""A batch goes through the same application as HTTP requests, and its clients through the real server."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.batch_file.answers import Answer, AnswerFile
from moe_runtime.batch_file.in_process import InProcessHandle
from moe_runtime.batch_file.requests import BatchRequest
from moe_runtime.batch_file.run import BatchSummary, run_batch
from moe_runtime.cli.main import main
from moe_runtime.errors import EngineDeadError
from tests.server.conftest import Served
from tests.server.fake_engine import REPLY, FakeEngine

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
TEXT = {"model": "demo", "prompt": "Once", "temperature": 0}


def _without_ids(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("id", "created")}


@pytest.mark.parametrize(
    ("url", "body", "status"),
    [
        ("/v1/chat/completions", CHAT, 200),
        ("/v1/completions", TEXT, 200),
        ("/v1/completions", {**TEXT, "model": "other"}, 404),
        ("/v1/completions", {**TEXT, "temperature": -1}, 400),
        ("/v1/chat/completions", {**CHAT, "messages": []}, 400),
    ],
)
def test_a_batch_gets_the_answers_that_http_gets(
    url: str, body: dict[str, Any], status: int, run: Callable[[Awaitable[None]], None]
) -> None:
    async def scenario() -> None:
        served = Served()
        async with InProcessHandle(served.app, served.engine.check_health) as handle:
            answer = await handle(url, body)
        expected = await served.post(url, body)
        assert (answer.status, expected.status_code) == (status, status)
        assert answer.request_id
        assert answer.body is not None
        assert _without_ids(answer.body) == _without_ids(expected.json())

    run(scenario())


def test_a_dead_engine_ends_the_batch(tmp_path: Path, run: Callable[[Awaitable[None]], None]) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        engine.error_after = (2, EngineDeadError("rank 1 died"))
        engine.healthy = False
        served = Served(engine)
        requests = [BatchRequest(n, f"r{n}", "/v1/completions", TEXT) for n in range(5)]
        summary = BatchSummary(total=5, skipped=0)
        with AnswerFile(tmp_path / "out", [r.custom_id for r in requests]) as output:
            async with InProcessHandle(served.app, engine.check_health) as handle:
                with pytest.raises(EngineDeadError):
                    await run_batch(requests, handle, output, summary, concurrency=2)
        assert (tmp_path / "out").read_text() == ""

    run(scenario())


@pytest.mark.parametrize(
    "arguments", [["chat", "--message", "Hi"], ["complete", "--prompt", "Once"]], ids=["chat", "complete"]
)
def test_chat_and_complete_are_clients_of_this_server(
    arguments: list[str], run: Callable[[Awaitable[None]], None]
) -> None:
    async def scenario() -> None:
        served = Served(api_keys=("secret",))
        printed = io.StringIO()
        async with served.listening() as url:
            flags = ["--base-url", f"{url}/v1", "--api-key", "secret", "--top-k", "3", "--max-tokens", "100"]
            with contextlib.redirect_stdout(printed):
                assert await asyncio.to_thread(main, [*arguments, *flags]) == 0
        assert printed.getvalue().strip() == REPLY.strip()
        assert served.engine.params[0].top_k == 3

    run(scenario())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_batch_on_ranks_goes_on_where_it_was_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [
        {**TEXT, "max_tokens": 4},
        {**CHAT, "max_tokens": 4},
        {**TEXT, "max_tokens": -4},
    ]
    urls = ["/v1/completions", "/v1/chat/completions", "/v1/completions"]
    lines = [
        {"custom_id": f"r{n}", "method": "POST", "url": url, "body": body}
        for n, (url, body) in enumerate(zip(urls, bodies, strict=True))
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    left = Answer(status=200, body={"left": "by an earlier run"}).line("r1")
    target.write_bytes(left + b'{"custom_id": "r0", "respo')

    arguments = ["run-batch", "-i", str(source), "-o", str(target), "--device", "cpu"]
    assert main(arguments) == 1
    answers = {answer["custom_id"]: answer for answer in map(json.loads, target.read_text().splitlines())}
    assert {name: answer["response"]["status_code"] for name, answer in answers.items()} == {
        "r0": 200,
        "r1": 200,
        "r2": 400,
    }
    assert answers["r0"]["response"]["body"]["usage"]["completion_tokens"] == 4
    assert answers["r1"] == json.loads(left)
    said = "1 of 3 requests answered, 1 by an earlier run, 1 failed (1 with status 400)"
    assert said in capsys.readouterr().err


def test_what_cannot_work_is_found_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": TEXT}
    source.write_text(json.dumps(line))
    target = str(tmp_path / "out.jsonl")
    for arguments, words in (
        (["-o", str(source)], "-i and -o are the same file"),
        (["-o", target, "--max-concurrency", "0"], "--max-concurrency must be at least 1, got 0"),
        (
            ["-o", target, "--connect", "prod", "--max-num-seqs", "4"],
            "--connect uses a deployment as it runs",
        ),
        (["-o", target, "--max-num-seqs", "0"], "max_num_seqs must be a whole number of at least 1"),
    ):
        assert main(["run-batch", "-i", str(source), *arguments]) == 2
        assert words in capsys.readouterr().err
