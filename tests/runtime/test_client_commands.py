"""`moe-runtime chat` and `complete`: clients of any OpenAI-compatible server."""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Iterator

import pytest

from moe_runtime.cli.main import main
from tests.runtime.openai_stub import OpenAIStub, chat_chunks, openai_stub, text_chunks


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOE_RUNTIME_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def _run(command: str, stub: OpenAIStub, *arguments: str) -> int:
    return main([command, "--base-url", stub.base_url, *arguments])


def _type(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Have a terminal give these lines, then its end."""
    given: Iterator[str | type[BaseException]] = iter([*lines, EOFError])

    def next_line(prompt: str) -> str:
        line = next(given)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", next_line)


def test_chat_streams_the_answer_to_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    with openai_stub([chat_chunks("Hel", "lo")]) as stub:
        arguments = ["--message", "Hi", "--system-prompt", "Be brief.", "--temperature", "0", "--top-k", "5"]
        assert _run("chat", stub, *arguments, "--stop", "x") == 0
    assert capsys.readouterr().out == "Hello\n"
    assert stub.requests == [
        {
            "_path": "/v1/chat/completions",
            "model": "stub",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
            ],
            "temperature": 0.0,
            "top_k": 5,
            "stop": ["x"],
            "stream": True,
        }
    ]


def test_complete_streams_the_continuation_of_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    with openai_stub([text_chunks(" upon", " a time")]) as stub:
        assert _run("complete", stub, "--prompt", "Once", "--model", "other", "--max-tokens", "4") == 0
    assert capsys.readouterr().out == " upon a time\n"
    expected = {
        "model": "other",
        "prompt": "Once",
        "max_tokens": 4,
        "stream": True,
        "_path": "/v1/completions",
    }
    assert stub.requests == [expected]


@pytest.mark.parametrize(
    ("command", "field"), [("chat", "messages"), ("complete", "prompt")], ids=["chat", "complete"]
)
def test_without_a_terminal_the_text_is_all_of_stdin(
    command: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "first line\nsecond line\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    with openai_stub([chat_chunks("x") if command == "chat" else text_chunks("x")]) as stub:
        assert _run(command, stub) == 0
    sent = stub.requests[0][field]
    assert sent == ([{"role": "user", "content": text}] if command == "chat" else text)


def test_an_empty_stdin_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert main(["chat"]) == 2
    assert "standard input is empty; write the text to it, or give --message TEXT" in capsys.readouterr().err


def test_a_conversation_goes_on_until_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    _type(monkeypatch, "one", "two", "", "/reset", "three", "/exit", "never")
    with openai_stub([chat_chunks("A"), chat_chunks("B"), chat_chunks("C")]) as stub:
        assert _run("chat", stub, "--system-prompt", "S") == 0
    assert [[m["content"] for m in request["messages"]] for request in stub.requests] == [
        ["S", "one"],
        ["S", "one", "A", "two"],
        ["S", "three"],
    ]


def test_several_messages_are_one_conversation() -> None:
    with openai_stub([chat_chunks("A"), chat_chunks("B")]) as stub:
        assert _run("chat", stub, "--message", "one", "--message", "two") == 0
    assert [m["content"] for m in stub.requests[1]["messages"]] == ["one", "A", "two"]


def test_an_error_in_a_conversation_leaves_it_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _type(monkeypatch, "one", "too long", KeyboardInterrupt, "two")
    refusal = (400, {"error": {"message": "the prompt has 9000 tokens, at most 4096 fit"}})
    with openai_stub([chat_chunks("A"), refusal, chat_chunks("B")]) as stub:
        assert _run("chat", stub) == 0
    assert [m["content"] for m in stub.requests[2]["messages"]] == ["one", "A", "two"]
    assert "answers 400: the prompt has 9000 tokens, at most 4096 fit\n" in capsys.readouterr().err


def test_each_line_is_completed_on_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _type(monkeypatch, "one", "two")
    with openai_stub([text_chunks("A"), (500, {"error": {"message": "oh"}}), text_chunks("B")]) as stub:
        assert _run("complete", stub) == 0
    assert [request["prompt"] for request in stub.requests] == ["one", "two"]
    assert "answers 500: oh" in capsys.readouterr().err


def test_an_answer_that_was_cut_off_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with openai_stub([chat_chunks("Hel", finish_reason="length")]) as stub:
        assert _run("chat", stub, "--message", "Hi") == 0
    assert "cut off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({}, ["--api-key", "secret"]),
        ({"OPENAI_API_KEY": "secret"}, []),
        ({"MOE_RUNTIME_API_KEY": "secret", "OPENAI_API_KEY": "another"}, []),
        ({"MOE_RUNTIME_API_KEY": "another"}, ["--api-key", "secret"]),
    ],
)
def test_the_key_comes_from_the_flag_or_the_environment(
    variables: dict[str, str], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with openai_stub([chat_chunks("x")], key="secret") as stub:
        assert _run("chat", stub, "--message", "Hi", *flags) == 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, {"error": {"message": "no model 'x'"}}), "/v1/chat/completions answers 404: no model 'x'"),
        ((500, "<html>\nBad\ngateway</html>"), "answers 500: <html> Bad gateway</html>"),
        ((422, {"detail": "no such field"}), "answers 422: no such field"),
        ((301, ""), "answers 301: Moved Permanently"),
        ((200, {"choices": []}), "answers with no event stream"),
        (["no JSON"], "sent an event that is no JSON: 'no JSON'"),
        (["[1]"], "sent an event that is no JSON object: '[1]'"),
        ([{"error": {"message": "rank 1 died"}}], "ended the answer: rank 1 died"),
        (chat_chunks("half")[:-1], "ended the stream before the answer was complete"),
    ],
)
def test_what_goes_wrong_is_one_line(answer: object, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with openai_stub([answer]) as stub:
        assert _run("chat", stub, "--message", "Hi") == 1
    error = capsys.readouterr().err
    assert error.startswith("moe-runtime: ServerError: ")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ({"data": []}, "serves no model"),
        ({"hello": 1}, "answers with something else than OpenAI's list of models"),
        ("<html>", "answers with something else than OpenAI's list of models"),
    ],
)
def test_a_list_of_models_that_is_none_is_refused(
    models: object, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with openai_stub(models=models) as stub:
        assert _run("chat", stub, "--message", "Hi") == 1
    assert words in capsys.readouterr().err


def test_a_wrong_key_names_the_ways_to_give_one(capsys: pytest.CaptureFixture[str]) -> None:
    with openai_stub(key="secret") as stub:
        assert _run("chat", stub, "--message", "Hi", "--api-key", "wrong") == 1
    error = capsys.readouterr().err
    assert (
        "refuses the API key (401: Incorrect API key provided); give --api-key, or set MOE_RUNTIME" in error
    )


@pytest.mark.parametrize("command", [("complete", "--prompt"), ("chat", "--message")])
def test_a_server_that_is_not_there_is_one_line_with_the_way_out(
    command: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with openai_stub() as stub:
        pass
    assert _run(command[0], stub, command[1], "Hi") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no server answers at {stub.base_url} (" in line
    assert line.endswith("; start one with `moe-runtime serve`, or give the right --base-url")


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://localhost/v1", "http://[::1", ""])
def test_a_url_that_is_none_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--base-url", url, "--message", "Hi"]) == 2
    assert "is no URL of a server" in capsys.readouterr().err


def test_a_key_that_no_header_can_carry_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--message", "Hi", "--api-key", "schlüssel\n"]) == 1
    assert "the API key cannot be sent in an HTTP header" in capsys.readouterr().err
