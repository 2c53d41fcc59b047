"""The input of a batch: one request a line, all checked before the first is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError, did_you_mean

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_KEYS = ("custom_id", "method", "url", "body")
_MAX_FAULTS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line of the input."""

    line_number: int  # from 1
    custom_id: str  # unique in its file
    url: str  # one of ROUTES
    body: dict[str, Any]


def check_requests(path: Path) -> set[str]:
    """Read the whole file and return the ids of its requests.

    Raises:
        ConfigError: it cannot be read, holds no request, or holds lines that are none, which are named.
    """
    faults: list[str] = []
    line_of_id: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            request = _parse(number, line)
        except ValueError as error:
            faults.append(f"line {number}: {error}")
            continue
        first = line_of_id.setdefault(request.custom_id, number)
        if first != number:
            faults.append(f"line {number}: custom_id {request.custom_id!r} is that of line {first} too")
    if faults:
        shown = "; ".join(faults[:_MAX_FAULTS_SHOWN])
        more = len(faults) - _MAX_FAULTS_SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        raise ConfigError(f"{path} is no batch file, nothing was started: {shown}{rest}")
    if not line_of_id:
        raise ConfigError(f"{path} holds no request; each line is one, a JSON object with {', '.join(_KEYS)}")
    return set(line_of_id)


def read_requests(path: Path) -> Iterator[BatchRequest]:
    """The requests of a file that `check_requests` has accepted, read as they are asked for."""
    for number, line in _lines(path):
        yield _parse(number, line)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, with their numbers."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _parse(number: int, line: bytes) -> BatchRequest:
    """ValueError says what is wrong with the line."""
    try:
        request = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(request, dict):
        raise ValueError(f"a JSON object is needed, got {type(request).__name__}")
    for key in request:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key[:50]!r}{did_you_mean(key[:50], _KEYS)}")
    for key in _KEYS:
        if key not in request:
            raise ValueError(f"{key} is missing")
    custom_id, method, url, body = (request[key] for key in _KEYS)
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError(f"custom_id must be a string that is not empty, got {custom_id!r:.50}")
    if method != "POST":
        raise ValueError(f"method must be 'POST', got {method!r:.50}")
    if url not in ROUTES:
        raise ValueError(f"url must be {' or '.join(ROUTES)}, got {url!r:.50}")
    if not isinstance(body, dict):
        raise ValueError(f"body must be a JSON object, got {body!r:.50}")
    if body.get("stream"):
        raise ValueError("body.stream must be false: a batch has whole answers only")
    return BatchRequest(number, custom_id, url, body)
