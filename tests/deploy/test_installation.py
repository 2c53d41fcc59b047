"""What machines and images install: all that a server can do, and nothing of the checkout that it does not need."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import PurePosixPath

import pytest

from tests.source_tree import ROOT

EXTRAS = {"serve", "structured"}


@pytest.mark.parametrize("file", ["cluster.yaml", "deploy/Dockerfile"])
def test_all_that_a_server_can_do_is_installed(file: str) -> None:
    lines = [
        line
        for line in (ROOT / file).read_text().splitlines()
        if "pip install" in line and "moe_runtime" in line
    ]
    (extras,) = [re.search(r'"\S+/moe_runtime\[(.+)\]"$', line) for line in lines]
    assert extras is not None, lines
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras[1].split(",")) == EXTRAS <= set(known)


def _is_sent(path: str) -> bool:
    """Whether Docker sends a file with the build: the last pattern that matches it or a folder above it decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        parts = PurePosixPath(path).parts
        heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        name = pattern.removeprefix("**/")
        # None of the patterns has a * before a slash, which fnmatch would let cross it.
        assert "*" not in name or "/" not in name, f"{line} is more than this test reads"
        hit = set(parts) if pattern.startswith("**/") else set(heads)
        if any(fnmatch(candidate, name) for candidate in hit):
            sent = line.startswith("!")
    return sent


def test_an_image_gets_the_packages_and_how_to_install_them() -> None:
    needed = ["pyproject.toml", "setup.py", "README.md", "LICENSE"]
    for package in ("moe_runtime", "kernels/moe_kernels", "models/moe_models"):
        needed += [
            str(path.relative_to(ROOT))
            for path in (ROOT / package).rglob("*")
            if path.is_file() and path.suffix != ".so" and "__pycache__" not in path.parts
        ]
    assert [path for path in needed if not _is_sent(path)] == []


def test_an_image_gets_nothing_else_of_a_checkout_in_which_somebody_works() -> None:
    patterns = (ROOT / ".gitignore").read_text().split()
    ignored = [pattern.replace("*.py[cod]", "a.pyc").replace("*", "a").rstrip("/") for pattern in patterns]
    unwanted = [
        *ignored,
        ".git/objects/pack/a",
        "tests/conftest.py",
        "docs/images/compare.svg",
        "kernels/moe_kernels/native/cpu_kernels-1.so",
        "moe_runtime/__pycache__/llm.cpython-312.pyc",
        "checkpoint/model-00001-of-00041.safetensors",
    ]
    assert [path for path in unwanted if _is_sent(path)] == []
