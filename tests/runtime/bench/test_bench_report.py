"""The report's versions: which commit a result is of."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from moe_runtime.bench import report

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=directory, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit, a tag on it and one file in a folder."""
    folder = tmp_path / "repository" / "package"
    folder.mkdir(parents=True)
    (folder / "module.py").write_text("a = 1\n")
    git(folder.parent, "init", "-q")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-q", "-m", "Begin")
    git(folder.parent, "tag", "v1")
    return folder.parent


@needs_git
def test_the_commit_is_the_short_hash_of_the_checkout(checkout: Path) -> None:
    module = checkout / "package" / "module.py"
    assert report._commit(module) == git(checkout, "rev-parse", "--short", "HEAD")
    (checkout / "result.json").write_text("{}")  # what a benchmark wrote does not change what ran
    assert report._commit(module) == git(checkout, "rev-parse", "--short", "HEAD")


@needs_git
def test_a_changed_file_shows(checkout: Path) -> None:
    module = checkout / "package" / "module.py"
    module.write_text("a = 2\n")
    assert report._commit(module) == git(checkout, "rev-parse", "--short", "HEAD") + "+changes"


@needs_git
def test_a_package_installed_inside_somebodys_repository_has_no_commit(checkout: Path) -> None:
    installed = checkout / ".venv" / "module.py"
    installed.parent.mkdir()
    installed.write_text("a = 1\n")
    assert report._commit(installed) is None


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "module.py").write_text("a = 1\n")
    assert report._commit(tmp_path / "module.py") is None


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report._commit(Path(report.__file__)) is None


def test_every_report_has_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_commit", lambda file: f"of {file.name}")
    made = report.Report(
        benchmark="x", device="cpu", started_load=0.0, workload={}, results=[], tables=[]
    ).to_dict()
    assert made["versions"]["commit"] == "of report.py"
    assert made["versions"]["moe_runtime"]
