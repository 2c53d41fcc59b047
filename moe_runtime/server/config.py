"""ServerConfig: how the HTTP server guards and limits what reaches the engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_runtime.errors import ConfigError
from moe_runtime.server.parsers import check_parser_name, parser_names

_API_KEY_VARIABLE = "MOE_RUNTIME_API_KEY"
# Fields that are whole numbers of at least 1, and those that are seconds above 0 (or None).
_COUNTS = ("max_body_bytes", "max_concurrent_requests", "max_logprobs", "max_prompts", "max_stop", "max_n")
_SECONDS = ("request_timeout_s", "body_timeout_s", "send_timeout_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of one HTTP server; the engine's own are in EngineConfig."""

    served_model_names: tuple[str, ...]  # what requests may call the model; the first is in every answer
    model_root: str = ""  # where the model came from, for /v1/models
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # none: everybody may ask
    allowed_origins: tuple[str, ...] = ()  # of browsers' cross-origin requests; none: CORS is off
    max_body_bytes: int = 8 * 2**20  # of one request
    max_concurrent_requests: int = 1024  # HTTP requests at work at once; more are refused with 429
    max_logprobs: int = 20  # logprobs, top_logprobs and prompt_logprobs of one request
    max_prompts: int = 2048  # prompts in one request
    max_stop: int = 64  # stop strings of one request: a rank follows each of them character by character
    max_n: int = 128  # choices of one prompt
    request_timeout_s: float | None = 3600.0  # from a request's arrival to the end of its answer
    body_timeout_s: float = 60.0  # for a request's body to arrive
    send_timeout_s: float = 60.0  # for a client to take a piece of a stream
    chat_template: str | None = None  # text of a template instead of the checkpoint's own
    enable_auto_tool_choice: bool = False  # let the model call functions by choice; needs tool_call_parser
    tool_call_parser: str | None = None  # the format in which the model calls functions
    reasoning_parser: str | None = None  # the format in which the model reasons; None: it stays content

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError(
                f"served_model_names must hold at least one name, none empty, got {self.served_model_names!r}"
            )
        if not all(self.api_keys):
            raise ConfigError("an API key is empty; remove it, since it would let everybody in")
        if not all(key.isascii() and key.isprintable() and not key.isspace() for key in self.api_keys):
            raise ConfigError("an API key holds a character that no HTTP header can carry; use ASCII")
        check_parser_name("tool_call", self.tool_call_parser)
        check_parser_name("reasoning", self.reasoning_parser)
        if self.enable_auto_tool_choice != (self.tool_call_parser is not None):
            raise ConfigError(
                "--enable-auto-tool-choice and --tool-call-parser NAME go together: give both, or none; the "
                f"parser is one of {', '.join(parser_names('tool_call'))}"
            )
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in _SECONDS:
            value = getattr(self, name)
            if value is None and name == "request_timeout_s":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigError(f"{name} must be a number of seconds above 0, got {value!r}")


def find_api_keys(given: Sequence[str], path: str | None, name: str) -> tuple[str, ...]:
    """Keys that were given, those of a file with one a line, and the environment's.

    Args:
        name: of the setting that gave the path, for errors.

    Raises ConfigError if the file cannot be read or holds no key.
    """
    keys = list(given)
    if (text := read_setting(path, name)) is not None:
        in_file = [line.strip() for line in text.splitlines() if line.strip()]
        if not in_file:
            raise ConfigError(f"{name} {path} holds no key; write one a line")
        keys += in_file
    if from_environment := os.environ.get(_API_KEY_VARIABLE):
        keys.append(from_environment)
    return tuple(keys)


def read_setting(path: str | None, name: str) -> str | None:
    """The text of the file that the setting `name` gives, None for none; ConfigError if it cannot be read."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {name} {path}: {error}") from error
