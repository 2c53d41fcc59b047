"""The input of a batch is refused as a whole, with every bad line named, or accepted as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.batch_file.requests import BatchRequest, check_requests, read_requests
from moe_runtime.errors import ConfigError

GOOD: dict[str, Any] = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"model": "m", "prompt": "Once"},
}


def _write(directory: Path, *lines: Any) -> Path:
    path = directory / "in.jsonl"
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts))
    return path


def test_a_good_file_is_read_in_its_order(tmp_path: Path) -> None:
    chat = {
        **GOOD,
        "custom_id": "b",
        "url": "/v1/chat/completions",
        "body": {"messages": [], "stream": False},
    }
    path = _write(tmp_path, GOOD, b"", b"  \r", chat)
    assert check_requests(path) == {"a", "b"}
    assert list(read_requests(path)) == [
        BatchRequest(1, "a", "/v1/completions", GOOD["body"]),
        BatchRequest(4, "b", "/v1/chat/completions", chat["body"]),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not JSON: Expecting property name"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 7"),
        ([1], "a JSON object is needed, got list"),
        ({**GOOD, "bdy": {}}, "unknown key 'bdy'; did you mean 'body'?"),
        ({"custom_id": "b", "method": "POST", "url": "/v1/completions"}, "body is missing"),
        ({**GOOD, "custom_id": 7}, "custom_id must be a string that is not empty, got 7"),
        ({**GOOD, "custom_id": ""}, "custom_id must be a string that is not empty, got ''"),
        ({**GOOD, "custom_id": "b", "method": "GET"}, "method must be 'POST', got 'GET'"),
        (
            {**GOOD, "custom_id": "b", "url": "/v1/chat"},
            "url must be /v1/chat/completions or /v1/completions or /v1/responses, got '/v1/chat'",
        ),
        ({**GOOD, "custom_id": "b", "url": ["x"]}, "url must be"),
        ({**GOOD, "custom_id": "b", "body": "Once"}, "body must be a JSON object, got 'Once'"),
        ({**GOOD, "custom_id": "b", "body": {"stream": True}}, "body.stream must be false"),
        (GOOD, "custom_id 'a' is that of line 1 too"),
    ],
)
def test_a_line_that_is_no_request_is_named(line: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        check_requests(_write(tmp_path, GOOD, line))
    assert f"line 2: {words}" in str(raised.value)
    assert len(str(raised.value)) < 400


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 10: not JSON.*; and 2 more$"):
        check_requests(_write(tmp_path, *[b"x"] * 12))


def test_a_file_without_requests_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no request; each line is one"):
        check_requests(_write(tmp_path, b"", b""))
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        check_requests(tmp_path / "missing")
