"""StructuredOutputsParams: the form that a text must have, in vLLM's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_runtime.arguments import refuse_unknown_arguments
from moe_runtime.errors import ConfigError
from moe_runtime.structured_outputs.ebnf import check_ebnf
from moe_runtime.structured_outputs.json_schema import check_json_schema
from moe_runtime.structured_outputs.regex import check_regex

MAX_BYTES = 128 * 1024  # of a schema, a grammar, or all choices together, as UTF-8
MAX_REGEX_BYTES = 16 * 1024
MAX_CHOICES = 10_000
MAX_TAG_CHARS = 64  # of `after` and `after_opening`

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@refuse_unknown_arguments
@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form of a text; exactly one of the first five must be given.

    The whole text has the form, or what comes after its reasoning, and then the request ends with the finish
    reason "stop" (or with "length", unfinished, at max_tokens). Every value is checked when it is made;
    ConfigError names what the grammar compiler cannot enforce.
    """

    json: str | Mapping[str, Any] | None = None  # a JSON schema; kept as a string
    regex: str | None = None  # of the whole text, with ASCII \d and \w, and a dot that matches no newline
    choice: list[str] | tuple[str, ...] | None = None  # one of these; kept as a tuple
    grammar: str | None = None  # EBNF in GBNF's syntax, from the rule `root`
    json_object: bool | None = None  # any JSON object
    disable_any_whitespace: bool = False  # JSON with one space after "," and ":" and no other white space
    # "</think>": the text up to the first of these is free, but cannot end before it; up to two line breaks may
    # stand between it and the form.
    after: str | None = None
    after_opening: str | None = None  # "<think>": a text that does not begin with it has the form throughout

    def __post_init__(self) -> None:
        if self.json_object not in (None, True, False):
            raise ConfigError(
                f"structured_outputs.json_object must be True or False, got {self.json_object!r}"
            )
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ConfigError(
                f"structured_outputs needs exactly one of {', '.join(_KINDS)}, got {', '.join(given) or 'none'}"
            )
        if not isinstance(self.disable_any_whitespace, bool):
            raise ConfigError(
                "structured_outputs.disable_any_whitespace must be True or False, got "
                f"{self.disable_any_whitespace!r}"
            )
        self._check_tags()
        check = {"json": self._check_json, "regex": self._check_regex, "choice": self._check_choice}
        check |= {"grammar": self._check_grammar}
        if given[0] in check:
            check[given[0]]()

    @property
    def kind(self) -> str:
        """Which of the five is given."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))

    def _check_tags(self) -> None:
        for name, tag in (("after", self.after), ("after_opening", self.after_opening)):
            if tag is not None and not (
                isinstance(tag, str) and tag.isascii() and tag.isprintable() and 0 < len(tag) <= MAX_TAG_CHARS
            ):
                raise ConfigError(
                    f"structured_outputs.{name} must be 1 to {MAX_TAG_CHARS} printable ASCII characters, "
                    f"got {_short(tag)}"
                )
        if self.after_opening is not None and self.after is None:
            raise ConfigError(
                f"structured_outputs.after_opening is {self.after_opening!r} but after is not given; "
                "say what closes it"
            )

    def _check_json(self) -> None:
        given = self.json
        if not isinstance(given, str | Mapping):
            raise ConfigError(
                f"structured_outputs.json must be a JSON schema, as a dict or a string, got {_short(given)}"
            )
        try:
            text = given if isinstance(given, str) else json.dumps(given, allow_nan=False)
            _check_size("json", text, MAX_BYTES)
            schema = json.loads(text, parse_constant=_refuse_constant)
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ConfigError(f"structured_outputs.json is no JSON: {reason}") from None
        check_json_schema(schema)
        object.__setattr__(self, "json", text)

    def _check_regex(self) -> None:
        if not isinstance(self.regex, str) or not self.regex:
            raise ConfigError(
                f"structured_outputs.regex must be a string that is not empty, got {self.regex!r}"
            )
        _check_size("regex", self.regex, MAX_REGEX_BYTES)
        check_regex(self.regex, "structured_outputs.regex")

    def _check_choice(self) -> None:
        choices = self.choice
        if not isinstance(choices, list | tuple) or not choices:
            raise ConfigError(f"structured_outputs.choice must be a list of strings, got {_short(choices)}")
        if len(choices) > MAX_CHOICES:
            raise ConfigError(
                f"structured_outputs.choice has {len(choices)} choices, at most {MAX_CHOICES} are taken"
            )
        for index, choice in enumerate(choices):
            if not isinstance(choice, str) or not choice:
                raise ConfigError(
                    f"structured_outputs.choice must hold strings that are not empty, got {_short(choice)} "
                    f"at index {index}"
                )
            if "\0" in choice:
                raise ConfigError(
                    f"structured_outputs.choice has a NUL character at index {index}; remove it"
                )
        _check_size("choice", "".join(choices), MAX_BYTES)
        object.__setattr__(self, "choice", tuple(choices))

    def _check_grammar(self) -> None:
        if not isinstance(self.grammar, str) or not self.grammar:
            raise ConfigError(
                f"structured_outputs.grammar must be a string that is not empty, got {_short(self.grammar)}"
            )
        _check_size("grammar", self.grammar, MAX_BYTES)
        check_ebnf(self.grammar)


def _check_size(name: str, text: str, limit: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ConfigError(f"structured_outputs.{name} holds what is no character: {error.reason}") from None
    if size > limit:
        raise ConfigError(
            f"structured_outputs.{name} has {size} bytes, at most {limit} are taken; shorten it"
        )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
