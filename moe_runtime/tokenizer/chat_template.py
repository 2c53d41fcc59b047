"""Chat templates: found beside the tokenizer, rendered in a sandbox with what Hugging Face documents for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_runtime.errors import ConfigError, PromptError, did_you_mean

TEMPLATE_FILE = "chat_template.jinja"
DEFAULT = "default"
TOOL_USE = "tool_use"  # the name of the template for conversations with tools, where a model has several

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """The chat templates of a model."""

    by_name: Mapping[str, str]  # "default" and others; empty where the model has none
    source: str  # the directory, for messages

    def render(
        self,
        messages: Sequence[Message],
        *,
        template: str | None,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """Render `messages`; see `Tokenizer.apply_chat_template`."""
        _check_messages(messages)
        text = self._choose(template, has_tools=bool(tools))
        try:
            compiled = _compile(text)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template in {self.source} is broken at line {error.lineno}: {error.message}"
            ) from error
        try:
            return compiled.render(
                **{
                    **variables,
                    "messages": [dict(m) for m in messages],
                    "tools": list(tools) if tools else None,
                }
            )
        except _RaisedByTemplateError as error:
            raise PromptError(f"the chat template refuses these messages: {error}") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise PromptError(
                f"the chat template cannot render these messages: {error}; check their keys"
            ) from error

    def _choose(self, wanted: str | None, *, has_tools: bool) -> str:
        if wanted is not None:
            if wanted in self.by_name:
                return self.by_name[wanted]
            if "{" in wanted:
                return wanted
            raise ConfigError(
                f"{self.source} has no chat template named {wanted!r}{did_you_mean(wanted, self.by_name)}; "
                f"it has {sorted(self.by_name) or 'none'}"
            )
        for name in (TOOL_USE, DEFAULT) if has_tools else (DEFAULT,):
            if name in self.by_name:
                return self.by_name[name]
        if self.by_name:
            raise ConfigError(
                f"{self.source} has several chat templates and none is the default; "
                f"choose with chat_template: {sorted(self.by_name)}"
            )
        raise ConfigError(
            f"{self.source} has no chat template (neither {TEMPLATE_FILE} nor 'chat_template' in "
            f"tokenizer_config.json), so it may be a base model; use generate, or give chat_template"
        )


def read_chat_templates(directory: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplates:
    """From chat_template.jinja, or else the key of tokenizer_config.json: a text, or a list of named texts."""
    file = directory / TEMPLATE_FILE
    if file.is_file():
        try:
            return ChatTemplates({DEFAULT: file.read_text(encoding="utf-8")}, str(directory))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is not UTF-8 text (byte {error.start}: {error.reason})") from error
    found = tokenizer_config.get("chat_template")
    if found is None:
        return ChatTemplates({}, str(directory))
    if isinstance(found, str):
        return ChatTemplates({DEFAULT: found}, str(directory))
    try:
        by_name = {str(item["name"]): str(item["template"]) for item in found}
    except (TypeError, KeyError) as error:
        raise ConfigError(
            f"{directory}: 'chat_template' in tokenizer_config.json must be a text, or a list of objects with "
            f"'name' and 'template'"
        ) from error
    return ChatTemplates(by_name, str(directory))


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(f"messages must be a list of objects with role and content, not {messages!r:.80}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"messages[{i}] must be an object with a 'role', not {message!r:.80}")


class _RaisedByTemplateError(Exception):
    """The template called raise_exception."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 -- the name and type that jinja2 reads

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@lru_cache(maxsize=32)
def _compile(text: str) -> jinja2.Template:
    # Immutable and sandboxed: a template comes with somebody's model and must not reach into this process.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    helpers: dict[str, Callable[[str], str]] = {"raise_exception": _raise, "strftime_now": _strftime_now}
    environment.globals.update(helpers)
    return environment.from_string(text)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja2's own filter escapes <, > and & for HTML, which a model must not see.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> str:
    raise _RaisedByTemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
