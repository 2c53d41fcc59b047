"""docs/environment.md lists every environment variable that the code reads or that another page names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.source_tree import ROOT, find_modules

PAGE = ROOT / "docs" / "environment.md"
# Variables of whoever sets them have these in front, in pages that name other things in capitals, too.
FAMILIES = r"MOE_RUNTIME|RAY|HF|CUDA|NCCL|GLOO|OMP|OPENAI|TORCH|TRITON|VLLM"


def _is_environ(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def _key(node: ast.AST) -> ast.expr | None:
    """What is looked up or set in the process's environment here, if anything is."""
    if isinstance(node, ast.Subscript) and _is_environ(node.value):
        return node.slice
    if isinstance(node, ast.Compare) and _is_environ(node.comparators[0]):
        return node.left
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
        return None
    return node.args[0] if node.func.attr == "getenv" or _is_environ(node.func.value) else None


def _values(tree: ast.Module) -> dict[str, ast.expr]:
    """What names stand for: constants of the module, and variables of its comprehensions."""
    values = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.comprehension) and isinstance(node.target, ast.Name):
            values.setdefault(node.target.id, node.iter)
    return values


def variables_read(source: str) -> Iterator[str]:
    """Names of the environment variables that Python code reads or sets for itself.

    Raises:
        ValueError: a name is computed, so that no page can be checked for it.
    """
    tree = ast.parse(source)
    values = _values(tree)
    for node in ast.walk(tree):
        key = _key(node)
        while isinstance(key, ast.Name) and key.id in values:
            key = values[key.id]
        if key is None:
            continue
        try:
            found = ast.literal_eval(key)
        except ValueError:
            raise ValueError(f"line {key.lineno}: {ast.unparse(key)} is no constant of the module") from None
        yield from [found] if isinstance(found, str) else found


def _in_the_code() -> set[str]:
    return {name for file in find_modules().values() for name in variables_read(file.read_text())}


def _in_pages() -> set[str]:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    return {name for page in pages for name in _named_by(page)}


def _named_by(page: Path) -> set[str]:
    spans = re.findall(r"`([^`\n]+)`", page.read_text())
    return {name for span in spans for name in re.findall(rf"\b(?:{FAMILIES})_[A-Z][A-Z0-9_]*\b", span)}


@pytest.mark.parametrize(
    "source",
    [
        "os.environ['A']",
        "os.environ.get('A', '') or 1",
        "os.environ.setdefault('A', '0')",
        "os.getenv('A')",
        "'A' not in os.environ",
        "_NAME = 'A'\ndef f(): return os.environ.get(_NAME)",
        "NAMES = ('A',)\ndef f(): return [os.environ.get(name) for name in NAMES]",
    ],
)
def test_every_way_to_read_a_variable_is_seen(source: str) -> None:
    assert list(variables_read(source)) == ["A"]


def test_a_computed_name_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="line 1: prefix \\+ 'A' is no constant of the module"):
        list(variables_read("os.environ[prefix + 'A']"))


@pytest.mark.parametrize("name", sorted(_in_the_code() | _in_pages()))
def test_a_variable_is_on_the_page(name: str) -> None:
    assert f"`{name}`" in PAGE.read_text()
