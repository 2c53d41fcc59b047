"""`bench serve` against a server that computes nothing: what is sent, what is counted, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.cli.main import main
from tests.runtime.bench.stream_stub import StreamStub, streaming
from tests.runtime.openai_stub import DONE, openai_stub, text_chunks
from tests.source_tree import ROOT

SMALL = ["--num-prompts", "6", "--random-input-len", "5", "--random-output-len", "4"]


def _bench(stub: StreamStub, *flags: str) -> int:
    return main(["bench", "serve", "--base-url", stub.url, *SMALL, *flags])


def _report(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_random_prompts_are_sent_as_token_ids_and_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "result.json"
    flags = ["--num-warmups", "2", "--max-concurrency", "2", "--ignore-eos", "--extra-body", '{"top_k": 1}']
    with streaming(StreamStub()) as stub:
        assert _bench(stub, *flags, "--save-result", str(saved), "--goodput", "e2el:100000") == 0
    output = capsys.readouterr().out
    report = json.loads(output.splitlines()[-1])
    result = report["results"][0]

    assert "============ Serving Benchmark Result ============" in output
    assert json.loads(saved.read_text()) == report
    assert (report["benchmark"], report["workload"]["prompts_as"]) == ("serve", "token ids")
    assert (result["completed"], result["failed"], result["outputs_counted_by_chunks"]) == (6, 0, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 24)
    assert result["max_concurrent_requests"] <= 2
    assert result["request_goodput"] == result["request_throughput"]
    assert len(stub.bodies) == 1 + 2 + 6  # a probe, warm-ups, and those that count
    expected = {"model": "stub", "temperature": 0.0, "max_tokens": 4, "ignore_eos": True, "top_k": 1}
    for body in stub.bodies[3:]:
        assert {name: body[name] for name in expected} == expected
        assert body["stream_options"] == {"include_usage": True}
        assert len(body["prompt"]) == 5
        assert all(isinstance(token, int) for token in body["prompt"])


def test_a_server_that_takes_no_token_ids_gets_words(capsys: pytest.CaptureFixture[str]) -> None:
    with streaming(StreamStub(takes_token_ids=False)) as stub:
        assert _bench(stub) == 0
    report = _report(capsys)

    assert report["workload"]["prompts_as"] == "words"
    assert report["results"][0]["completed"] == 6
    assert all(isinstance(body["prompt"], str) for body in stub.bodies[2:])


def test_a_server_that_sends_no_usage_has_its_chunks_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with streaming(StreamStub(sends_usage=False)) as stub:
        assert _bench(stub, "--endpoint", "/v1/chat/completions") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])["results"][0]

    assert (result["total_output_tokens"], result["outputs_counted_by_chunks"]) == (24, 6)
    assert "the server sent no usage with 6 of 6 answers" in captured.err
    assert "the server sent no usage" in result["warnings"][0]


def test_every_turn_of_a_chat_sends_what_was_said_before(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dataset-name", "multi-turn", "--multi-turn-num-turns", "3", "--random-output-len", "2"]
    with streaming(StreamStub()) as stub:
        assert _bench(stub, *flags, "--endpoint", "/v1/chat/completions") == 0
    assert _report(capsys)["results"][0]["completed"] == 6

    sent = [body["messages"] for body in stub.bodies[1:]]
    assert Counter(map(len, sent)) == {1: 2, 3: 2, 5: 2}
    for messages in sent:
        assert [m["role"] for m in messages] == (["user", "assistant"] * 3)[: len(messages)]
        assert all(m["content"] == " word word" for m in messages if m["role"] == "assistant")
        assert messages[:-2] in [*sent, []]


def test_a_completion_goes_on_from_its_answer() -> None:
    flags = ["--dataset-name", "multi-turn", "--num-prompts", "2", "--multi-turn-num-turns", "2"]
    with streaming(StreamStub()) as stub:
        assert _bench(stub, *flags) == 0
    first, second = (body["prompt"] for body in stub.bodies[1:])
    assert second.startswith(f"{first} word word word word\n")


def test_failures_are_counted_and_the_first_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with streaming(StreamStub(refuse_every=3, drop_every=4)) as stub:
        assert _bench(stub, "--max-concurrency", "1") == 1  # numbers 2 to 7: 3 and 6 refused, 4 dropped
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])["results"][0]

    assert (result["completed"], result["failed"]) == (3, 3)
    assert result["first_error"] == "HTTP 503: too many requests wait"
    assert "  the first failed with: HTTP 503: too many requests wait\n" in output
    assert result["total_output_tokens"] == 12


def test_a_lost_connection_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with streaming(StreamStub(drop_every=2)) as stub:
        assert _bench(stub, "--num-prompts", "1") == 1
    assert "the connection was lost" in _report(capsys)["results"][0]["first_error"]


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with streaming(StreamStub()) as stub:
        assert _bench(stub, "--plot", str(tmp_path / "run")) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.png", "run.svg"]


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--port", "1", *SMALL]) == 1
    assert "no server answers at http://127.0.0.1:1/v1" in capsys.readouterr().err
    assert main(["bench", "serve", "--port", "1", "--model", "x", *SMALL]) == 1
    assert "the server refuses the first request: cannot connect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--dataset-name", "sharegpt"],
            "--dataset-name must be one of random, shared-prefix, multi-turn, file",
        ),
        (["--dataset-name", "file"], "--dataset-name file needs --dataset-path FILE"),
        (["--dataset-path", "x"], "--dataset-path is for --dataset-name file"),
        (["--dataset-name", "file", "--dataset-path", "/nowhere"], "cannot read --dataset-path /nowhere"),
        (["--endpoint", "/v1/chat"], "did you mean '/v1/chat/completions'?"),
        (["--base-url", "ftp://x"], "ftp://x/v1/completions is no URL of a server"),
        (["--num-prompts", "0"], "--num-prompts must be at least 1, got 0"),
        (["--request-rate", "0"], "--request-rate must be above 0, or inf"),
        (["--request-rate", "nan"], "--request-rate must be above 0, or inf"),
        (["--burstiness", "0"], "--burstiness must be above 0, got 0"),
        (["--max-concurrency", "0"], "--max-concurrency must be at least 1, got 0"),
        (["--random-range-ratio", "1"], "--random-range-ratio must be at least 0 and below 1"),
        (["--random-input-len", "0"], "--random-input-len must be at least 1, got 0"),
        (
            ["--dataset-name", "shared-prefix", "--shared-prefix-num-groups", "9"],
            "between 1 and --num-prompts 6",
        ),
        (["--dataset-name", "multi-turn", "--multi-turn-num-turns", "0"], "--multi-turn-num-turns must be"),
        (["--goodput", "tpot"], "--goodput tpot: wanted milliseconds"),
        (["--percentile-metrics", "ttft,x"], "--percentile-metrics must be one of ttft, tpot, itl, e2el"),
        (["--metric-percentiles", "101"], "--metric-percentiles must be between 0 and 100, got 101"),
        (["--extra-body", "[]"], "--extra-body must be a JSON object"),
        (["--plot", "/nowhere/x"], "--plot /nowhere/x: give a prefix in a directory that exists"),
        (["--save-result", "/nowhere/x"], "--save-result /nowhere/x: give a file"),
    ],
)
def test_bad_flags_are_refused_in_one_line_before_a_request_is_sent(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # No server is there: whoever asks for one fails with another status.
    assert main(["bench", "serve", "--port", "1", *SMALL, *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_the_client_needs_neither_torch_nor_ray() -> None:
    program = (
        "import sys; from moe_runtime.cli.main import main\n"
        f"status = main(['bench', 'serve', '--port', '1', *{SMALL}])\n"
        'sys.exit(f\'{status} {sorted({"ray", "torch"} & set(sys.modules))}\')'
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.stderr.splitlines()[-1] == "1 []"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([{"choices": ["x"]}, DONE], "the answer is not what OpenAI's API sends: AttributeError"),
        ([], "the answer has no output"),
        ((404, "no such route"), "HTTP 404: no such route"),
        ((400, {"detail": "bad model"}), "HTTP 400: bad model"),
    ],
)
def test_a_server_that_speaks_another_language_is_one_line(
    answer: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # This stub speaks HTTP/1.0: the end of the connection is the end of the answer.
    with openai_stub([answer]) as stub:
        assert main(["bench", "serve", "--base-url", stub.base_url, *SMALL]) == 1
    assert f"the server refuses the first request: {words}" in capsys.readouterr().err


def test_an_answer_may_end_with_its_connection(capsys: pytest.CaptureFixture[str]) -> None:
    with openai_stub([text_chunks(" a", " b")]) as stub:
        assert main(["bench", "serve", "--base-url", stub.base_url, *SMALL]) == 0
    assert _report(capsys)["results"][0]["total_output_tokens"] == 12
