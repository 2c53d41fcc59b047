"""docs/troubleshooting.md quotes errors as the code has them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.source_tree import ROOT, find_modules

# Ray's own, which we have no say in.
NOT_OURS = {"Missing authentication token"}


def _quoted() -> list[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    return [words for words in re.findall(r"^### `(.+)`$", page, flags=re.MULTILINE) if words not in NOT_OURS]


def _texts() -> Iterator[str]:
    """Every string of the source, values in it as "…"."""
    for file in find_modules().values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(_texts())


@pytest.mark.parametrize("words", _quoted())
def test_an_error_in_the_page_is_one_in_the_code(words: str, texts: list[str]) -> None:
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in words.split("…")), flags=re.DOTALL)
    assert any(pattern.search(text) for text in texts)
