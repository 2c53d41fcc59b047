"""Prompts from files: a JSON object a line, or the JSON list of conversations that ShareGPT is."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_runtime.bench.serving.prompts import Conversation, Turn
from moe_runtime.errors import ConfigError

# ShareGPT has answers but no tokenizer: English has about three words in four tokens.
_TOKENS_PER_WORD = 4 / 3


def file_prompts(
    path: str, count: int, default_output_len: int, output_len: int | None, seed: int
) -> list[Conversation]:
    """`count` of a file's prompts in an order drawn by `seed`; again from the beginning if it has fewer.

    Lines are `{"prompt": text or token ids, "output_len": N}` or `{"messages": [...], "output_len": N}`. Of a
    ShareGPT conversation the first message is the prompt, and the answer's words estimate the output length.

    Args:
        default_output_len: for lines that say nothing.
        output_len: for all, whatever they say.

    Raises:
        ConfigError: the file cannot be read or has no prompts, or a line is no prompt.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --dataset-path {path}: {error}") from None
    turns = [
        Turn(
            prompt=prompt,
            output_len=output_len or own_len or default_output_len,
            prompt_len=len(prompt) if _is_ids(prompt) else None,
        )
        for prompt, own_len in _entries(text, path)
    ]
    if not turns:
        raise ConfigError(f"--dataset-path {path} has no prompts")
    random.Random(f"file-{seed}").shuffle(turns)
    return [Conversation(turns=(turns[number % len(turns)],)) for number in range(count)]


def _entries(text: str, path: str) -> Iterator[tuple[Any, int | None]]:
    """Each prompt with its output length."""
    if text.lstrip().startswith("["):
        yield from _share_gpt(text, path)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _entry(_parse(line, where), where)


def _entry(item: Any, where: str) -> tuple[Any, int | None]:
    if not isinstance(item, dict) or ("prompt" in item) == ("messages" in item):
        raise ConfigError(f'{where}: wanted an object with either "prompt" or "messages", got {_short(item)}')
    output_len = item.get("output_len", item.get("output_tokens"))
    if output_len is not None and (not isinstance(output_len, int) or output_len < 1):
        raise ConfigError(f"{where}: output_len must be a whole number of at least 1, got {output_len!r}")
    if "prompt" in item:
        prompt = item["prompt"]
        if isinstance(prompt, str) and prompt:
            return prompt, output_len
        if isinstance(prompt, list) and _is_ids(prompt):
            return tuple(prompt), output_len
        raise ConfigError(f"{where}: prompt must be text or a list of token ids, got {_short(prompt)}")
    messages = item["messages"]
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        return tuple(messages), output_len
    raise ConfigError(f"{where}: messages must be a list of objects, got {_short(messages)}")


def _share_gpt(text: str, path: str) -> Iterator[tuple[str, int]]:
    items = _parse(text, path)
    for number, item in enumerate(items):
        try:
            said = [str(message["value"]) for message in item["conversations"]]
        except (KeyError, TypeError):
            raise ConfigError(
                f"{path}, item {number}: wanted ShareGPT's "
                '{"conversations": [{"from": ..., "value": ...}, ...]}, '
                f"got {_short(item)}"
            ) from None
        # Some begin with an answer or have none: vLLM leaves them out too.
        if len(said) >= 2 and said[0].strip() and said[1].strip():
            yield said[0], max(1, round(len(said[1].split()) * _TOKENS_PER_WORD))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}") from None


def _is_ids(prompt: Any) -> bool:
    return not isinstance(prompt, str) and bool(prompt) and all(type(token) is int for token in prompt)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
