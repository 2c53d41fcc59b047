"""The output of a batch survives whatever stops a run: the next one goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.batch_file.answers import Answer, AnswerFile
from moe_runtime.errors import ConfigError

IDS = ("a", "b", "c")
GOOD = Answer(status=200, request_id="r1", body={"text": "Grüße"})


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def _ids(path: Path) -> list[str]:
    return [line["custom_id"] for line in _lines(path)]


def test_lines_have_openai_s_shape(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, IDS) as output:
        output.write("a", GOOD)
        output.write("b", Answer(status=400, request_id="r2", body={"error": {"message": "no"}}))
        output.write("c", Answer(status=None, error="KeyError: 'x'"))
    lines = _lines(path)
    assert len({line.pop("id") for line in lines}) == 3
    assert lines == [
        {
            "custom_id": "a",
            "response": {"status_code": 200, "request_id": "r1", "body": {"text": "Grüße"}},
            "error": None,
        },
        {
            "custom_id": "b",
            "response": {"status_code": 400, "request_id": "r2", "body": {"error": {"message": "no"}}},
            "error": None,
        },
        {
            "custom_id": "c",
            "response": None,
            "error": {"code": "internal_error", "message": "KeyError: 'x'"},
        },
    ]


def test_answers_stay_and_errors_go_when_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, IDS) as output:
        output.write("a", Answer(status=500, body={}))
        output.write("b", GOOD)
        output.write("c", Answer(status=None, error="x"))
        assert output.answered == {"b"}
    before = _lines(path)[1]
    with AnswerFile(path, IDS) as output:
        assert output.answered == {"b"}
        output.write("a", GOOD)
    assert _ids(path) == ["b", "a"]
    assert _lines(path)[0] == before
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_file_with_nothing_to_drop_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnswerFile(path, IDS) as output:
        output.write("a", GOOD)
    inode = path.stat().st_ino
    with AnswerFile(path, IDS) as output:
        output.write("b", GOOD)
    assert path.stat().st_ino == inode
    assert _ids(path) == ["a", "b"]


def test_a_line_torn_at_any_byte_is_answered_again(tmp_path: Path) -> None:
    first, torn = GOOD.line("a"), GOOD.line("b")
    for length in range(len(torn)):
        path = tmp_path / f"{length}.jsonl"
        path.write_bytes(first + torn[:length])
        whole = length == len(torn) - 1  # all but the line's end is there
        with AnswerFile(path, IDS) as output:
            assert output.answered == ({"a", "b"} if whole else {"a"})
            output.write("c", GOOD)
        assert _ids(path) == (["a", "b", "c"] if whole else ["a", "c"])


@pytest.mark.parametrize(
    "garbage", [b"null", b"[]", b'{"custom_id": "b"}', b'{"custom_id": "b", "response": null}', b"\xff\x00"]
)
def test_lines_that_are_no_answers_go(garbage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(garbage + b"\n" + GOOD.line("a") + GOOD.line("a"))
    with AnswerFile(path, IDS) as output:
        assert output.answered == {"a"}
    assert _ids(path) == ["a"]


def test_answers_to_another_batch_are_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    content = b"torn\n" + GOOD.line("z")
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match="answers 'z', which the input does not ask: it belongs to another batch"
    ):
        AnswerFile(path, IDS)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"torn"], ids=["kept", "replaced"])
def test_two_runs_do_not_write_one_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with AnswerFile(path, IDS), pytest.raises(ConfigError, match="another run writes"):
        AnswerFile(path, IDS)
    AnswerFile(path, IDS).close()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .*: No such file or directory"):
        AnswerFile(tmp_path / "missing" / "out.jsonl", IDS)
