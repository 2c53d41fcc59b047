"""What a Markdown page links to, which anchors it has, and which of our commands it shows."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, takewhile
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

_MARKDOWN = MarkdownIt("commonmark").enable("table")
# How our command line begins: by itself, or at the end of somebody else's, as in `ray job submit ... -- python -m`.
_PROGRAMS = (["moe-runtime"], ["python", "-m", "moe_runtime"])
_SHELL_OPERATORS = frozenset("();<>|&")


def links(text: str) -> list[str]:
    """Targets of all links and images that stay within the repository, images of HTML included."""
    found = []
    for token in _tokens(text):
        if token.type in ("link_open", "image"):
            found.append(str(token.attrGet("href") or token.attrGet("src")))
        elif token.type in ("html_inline", "html_block"):
            found += re.findall(r'\b(?:href|src)="([^"]*)"', token.content)
    return [unquote(target) for target in found if not urlsplit(target).scheme]


def anchors(text: str) -> set[str]:
    """What a `#` can lead to on GitHub: headings by its rules, and ids in HTML."""
    found, seen = set(), Counter[str]()
    for token, following in pairwise(_tokens(f"{text}\n\nthe end")):
        if token.type == "heading_open":
            slug = _slug(following)
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
        elif token.type in ("html_inline", "html_block"):
            found.update(re.findall(r'\b(?:id|name)="([^"]*)"', token.content))
    return found


def commands(text: str) -> list[list[str]]:
    """Arguments of each `moe-runtime` in code blocks, and of those in running text that have flags."""
    found = []
    for token in _tokens(text):
        if token.type in ("fence", "code_block"):
            for line in token.content.replace("\\\n", " ").splitlines():
                found += _our_arguments(line)
        elif token.type == "code_inline" and " --" in token.content:
            found += _our_arguments(token.content)
    return found


def _tokens(text: str) -> Iterator[Token]:
    for token in _MARKDOWN.parse(text):
        yield token
        yield from token.children or ()


def _slug(heading: Token) -> str:
    words = "".join(part.content for part in heading.children or () if part.type in ("text", "code_inline"))
    return re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")


def _our_arguments(line: str) -> Iterator[list[str]]:
    """Arguments of our command in a line, if it has one, with values for the page's placeholders."""
    if not any(f"{' '.join(program)} " in line for program in _PROGRAMS):
        return  # code or output, which a shell's lexer may not understand
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    for program in _PROGRAMS:
        for start in range(len(words)):
            after = start + len(program)
            if words[start:after] == program:
                ours = takewhile(lambda word: not set(word) <= _SHELL_OPERATORS, words[after:])
                yield [_placeholder_value(word) for word in ours]


def _placeholder_value(word: str) -> str:
    """A number for N; what may be left out, as [NAME], as if it were given."""
    return "1" if word == "N" else re.sub(r"^\[([A-Z]+)\]$", r"\1", word)
