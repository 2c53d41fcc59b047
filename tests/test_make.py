"""The make targets' set-up: complete, done once, and mended after a failure. A stand-in for Python keeps a log."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

# Logs its command line; makes environments that hold copies of itself. $BREAK names the step that fails.
STAND_IN = f"""#!/bin/sh
here=$(dirname "$0")
echo "$(basename "$0") $*" >>"$LOG"
case "$*" in
    "-c "*) exec {sys.executable} -c "import sys; sys.version_info = (3, $MINOR); $2" ;;
    "-m venv --clear "*)
        rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && cp "$0" "$4/bin/moe-runtime"
        [ "$BREAK" != venv ] && touch "$4/bin/pip" ;;
    "-m pip --version") [ -e "$here/pip" ] ;;
    "-m pip install "*) [ "$BREAK" != pip ] ;;
esac
"""
MAKE_VENV = "python3 -m venv --clear .venv"
INSTALL = "python -m pip install --quiet --disable-pip-version-check --editable "


class Tree:
    """A directory with our Makefile, and what `make` did there."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self._stand_in = directory / "python3"
        self._stand_in.write_text(STAND_IN)
        self._stand_in.chmod(0o755)
        shutil.copy(ROOT / "Makefile", directory)
        for name in ("pyproject.toml", "setup.py"):
            (directory / name).touch()

    def make(self, *targets: str, breaks: str = "", minor: int = 11) -> tuple[list[str], str]:
        """What the stand-in was asked to do, questions left out, and what was said on stderr."""
        log = self.path / "log"
        log.write_text("")
        env = {"PATH": os.environ["PATH"], "LOG": str(log), "BREAK": breaks, "MINOR": str(minor)}
        process = subprocess.run(
            ["make", *targets, f"PYTHON={self._stand_in}"],
            cwd=self.path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert (process.returncode != 0) == bool(breaks or minor < 11), process.stderr
        asked = [
            line for line in log.read_text().splitlines() if " -c " not in line and "--version" not in line
        ]
        return asked, process.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_set_up_is_done_once(tree: Tree) -> None:
    assert tree.make("test")[0] == [MAKE_VENV, INSTALL + ".[test]", "python -m pytest"]
    assert tree.make("test")[0] == ["python -m pytest"]
    (demo,) = tree.make("demo")[0]
    assert demo.startswith("moe-runtime generate --prompt ")


def test_the_demo_does_not_install_what_only_tests_need(tree: Tree) -> None:
    made, installed, demo = tree.make("demo", "MODEL=a/model")[0]

    assert (made, installed) == (MAKE_VENV, INSTALL + ".")
    assert demo.startswith("moe-runtime generate a/model --prompt ")
    assert tree.make("test")[0] == [INSTALL + ".[test]", "python -m pytest"]


def test_changed_dependencies_are_installed(tree: Tree) -> None:
    tree.make("test")
    later = (tree.path / ".venv" / ".test-installed").stat().st_mtime + 1
    os.utime(tree.path / "pyproject.toml", (later, later))

    assert tree.make("test")[0] == [INSTALL + ".[test]", "python -m pytest"]


def test_a_half_made_environment_is_made_anew(tree: Tree) -> None:
    assert tree.make("test", breaks="venv")[0] == [MAKE_VENV]
    assert (tree.path / ".venv" / "bin" / "python").exists()

    assert tree.make("test")[0] == [MAKE_VENV, INSTALL + ".[test]", "python -m pytest"]


def test_a_failed_install_is_tried_again(tree: Tree) -> None:
    assert tree.make("demo", breaks="pip")[0] == [MAKE_VENV, INSTALL + "."]

    assert tree.make("demo")[0][0] == INSTALL + "."
    assert tree.make("demo")[0][0].startswith("moe-runtime ")


def test_an_environment_made_by_other_means_is_kept(tree: Tree) -> None:
    tree.make("demo")
    for stamp in (tree.path / ".venv").glob(".*"):
        stamp.unlink()

    assert tree.make("demo")[0][0] == INSTALL + "."


def test_an_old_python_is_refused_in_one_line(tree: Tree) -> None:
    asked, stderr = tree.make("test", minor=10)

    assert asked == []
    said = [line for line in stderr.splitlines() if not line.startswith("make: ")]
    assert said == [
        f"moe_runtime needs Python 3.11 or newer, {tree.path}/python3 is 3.10; pass PYTHON=python3.11"
    ]
    assert not (tree.path / ".venv").exists()
