"""Reasoning between <think> and </think>, at the start of the answer."""

from __future__ import annotations

import re

from moe_runtime.server.parsers.reader import NEWLINES, SPACE, Reading
from moe_runtime.server.parsers.stream import StreamParser

_BEGIN, _END = "<think>", "</think>"
_CALL = "<tool_call>"
_FUNCTION = "<function="
_PLAIN = re.compile(r"[^\r\n<]+")

# By vLLM's names, those whose models write this format: whether an answer starts inside the reasoning where the
# prompt tells nothing of it.
REASONING_PARSERS = {
    "deepseek_r1": True,
    "deepseek_v3": False,
    "glm45": False,
    "mimo": False,
    "minimax_m2": True,
    "olmo3": False,
    "qwen3": False,
    "step3": True,
}


def prompt_ends_in_reasoning(prompt: str) -> bool | None:
    """Whether the answer to `prompt` continues a <think> block; None if it has no such block after its last turn.

    True for a prompt that ends in "<think>\\n", False for one that ends in "<think>\\n\\n</think>\\n\\n". A block
    followed by anything but white space is part of the conversation and tells nothing.
    """
    text = prompt.rstrip()
    if text.endswith(_BEGIN):
        return True
    return False if text.endswith(_END) else None


def starts_in_reasoning(parser: str, prompt_ends_in_reasoning: bool | None) -> bool:
    """Whether an answer's first character is of its reasoning; where the prompt tells nothing, the format does."""
    return REASONING_PARSERS[parser] if prompt_ends_in_reasoning is None else prompt_ends_in_reasoning


def tags_before_form(parser: str, prompt_ends_in_reasoning: bool | None) -> tuple[str | None, str | None]:
    """`after` and `after_opening` of a form that leaves a place for reasoning unless the prompt has closed it."""
    if starts_in_reasoning(parser, prompt_ends_in_reasoning):
        return _END, None
    return (None, None) if prompt_ends_in_reasoning is False else (_END, _BEGIN)


class ReasoningParser(StreamParser):
    """Splits reasoning from the rest, which is content.

    A block counts only at the very start; a tag further on is content. Line breaks just inside and just after the
    block belong to it. Where no </think> comes, all is reasoning.
    """

    def __init__(self, *, starts_open: bool, ends_at_call: bool = False) -> None:
        """Args:
        starts_open: the text starts inside the block; a <think> that is repeated there is left out.
        ends_at_call: a line that begins a call in Qwen3-Coder's format ends the reasoning too. Models of
            this format forget </think> now and then.
        """
        super().__init__()
        self._starts_open = starts_open
        self._ends = (_END, _CALL) if ends_at_call else (_END,)

    def _read(self) -> Reading[None]:
        if (yield from self._read_begin()):
            yield from self._read_reasoning()
        yield from self._read_content()

    def _read_begin(self) -> Reading[bool]:
        """Whether the reasoning has begun."""
        space = yield from self._reader.run(SPACE)
        tag, text = yield from self._reader.tag((_BEGIN,))
        if tag:
            return True
        if self._starts_open:
            self._reader.unread(space + text)
            return True
        self._sink.content(space + text)
        return False

    def _read_reasoning(self) -> Reading[None]:
        breaks = yield from self._reader.run(NEWLINES)
        at_line, at_start = True, True
        while char := (yield from self._reader.peek()):
            if char == "<":
                if (yield from self._read_end("" if at_start else breaks, at_line)):
                    return
                breaks, at_line = "", False
            elif char in "\r\n":
                breaks, at_line = (yield from self._reader.run(NEWLINES)), True
                continue
            else:
                self._sink.reasoning(("" if at_start else breaks) + self._reader.take(_PLAIN))
                breaks, at_line = "", False
            at_start = False
        self._sink.reasoning("" if at_start else breaks)

    def _read_end(self, breaks: str, at_line: bool) -> Reading[bool]:
        """Whether the reasoning ends at this "<", before which there are line breaks."""
        tag, text = yield from self._reader.tag(self._ends)
        if tag == _END:
            yield from self._reader.run(NEWLINES)
            return True
        if tag == _CALL and at_line:
            space = yield from self._reader.run(SPACE)
            function, begun = yield from self._reader.tag((_FUNCTION,))
            self._reader.unread(space + begun)
            if function:
                self._sink.content(tag)
                return True
        self._sink.reasoning(breaks + text)
        return False
