"""The pages: every link leads somewhere, and every command line that they show is one that the program takes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from moe_runtime.cli.main import build_parser
from tests.markdown_page import anchors, commands, links
from tests.source_tree import ROOT

PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return build_parser()


def leads_somewhere(page: Path, target: str) -> bool:
    """Whether a page's relative link is to a file or folder of the repository, and to an anchor that it has."""
    path, _, anchor = target.partition("#")
    found = (page.parent / path).resolve() if path else page
    if not found.exists() or not found.is_relative_to(ROOT):
        return False
    return not anchor or (found.suffix == ".md" and anchor in anchors(found.read_text()))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    file = ROOT / page
    assert [target for target in links(file.read_text()) if not leads_somewhere(file, target)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_is_one_that_the_program_takes(page: str, parser: argparse.ArgumentParser) -> None:
    for arguments in commands((ROOT / page).read_text()):
        try:
            parser.parse_args(arguments)
        except SystemExit:  # what is wrong has been written to stderr
            pytest.fail(f"{page}: moe-runtime {' '.join(arguments)}", pytrace=False)


@pytest.mark.parametrize(
    ("target", "leads"),
    [
        ("kernels.md#tuning-for-a-new-gpu", True),
        ("#bench-serve", True),
        ("../deploy", True),
        ("no.md", False),
        ("kernels.md#no", False),
        ("#no", False),
        ("images/compare.svg#no", False),
        ("../..", False),
    ],
)
def test_a_link_that_leads_nowhere_is_seen(target: str, leads: bool) -> None:
    assert leads_somewhere(ROOT / "docs" / "benchmarks.md", target) == leads


def test_the_pages_have_links_and_command_lines() -> None:
    texts = [(ROOT / page).read_text() for page in PAGES]
    assert sum(len(links(text)) for text in texts) > 40
    assert sum(len(commands(text)) for text in texts) > 50


# --------------------------------------------------------------------------- how a page is read


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](b.md) and ![c\nd](e.svg)", ["b.md", "e.svg"]),
        ("[a][1]\n\n[1]: b.md#c", ["b.md#c"]),
        ("| a |\n|---|\n| [b](c.md) |", ["c.md"]),
        ('<p><a href="a.md"><img src="b%20c.png"></a></p>', ["a.md", "b c.png"]),
        ("[a](https://b.c/d) <mailto:e@f.g>", []),
        ("`[a](b.md)`\n\n    [c](d.md)\n", []),
    ],
)
def test_links_of_every_kind_are_found(text: str, expected: list[str]) -> None:
    assert links(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("## Tuning for a new GPU", {"tuning-for-a-new-gpu"}),
        ("## `bench serve`, v1.0: what's *new* & [old](x.md)?", {"bench-serve-v10-whats-new--old"}),
        ("## `max_num-seqs`", {"max_num-seqs"}),
        ("# A\n## a\nA\n-", {"a", "a-1", "a-2"}),
        ('<a id="b"></a>**C.**', {"b"}),
        ("    # no heading", set()),
    ],
)
def test_anchors_are_githubs(text: str, expected: set[str]) -> None:
    assert anchors(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('    moe-runtime chat --message "a b"   # why\n', [["chat", "--message", "a b"]]),
        ("```\nmoe-runtime serve \\\n    M\n$ moe-runtime chat\n```", [["serve", "M"], ["chat"]]),
        ("    ray job submit --a b -- \\\n      python -m moe_runtime serve M\n", [["serve", "M"]]),
        ("    moe-runtime complete < a.txt | tee b && moe-runtime chat\n", [["complete"], ["chat"]]),
        ("    moe-runtime status [NAME]\n", [["status", "NAME"]]),
        ("`moe-runtime serve --rank N` or `moe-runtime bench NAME`", [["serve", "--rank", "1"]]),
        ("    moe-runtime: error: it's wrong\n", []),
        ("    kubectl get rayjob moe-runtime-serve\n", []),
    ],
)  # fmt: skip
def test_commands_are_found_as_a_shell_would_have_them(text: str, expected: list[list[str]]) -> None:
    assert commands(text) == expected
