"""The packages that the demo checkpoint's text comes from: fetched once, and no others without a word."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import train_demo_checkpoint
from demo_training import sources
from demo_training.sources import SOURCES, SourceError, fetch, provenance
from moe_runtime.modelfiles import resolve_model

CONTENT = b"novels\n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
# Stand-ins for Debian's programs, which other systems lack: an archive's name and content are its package's.
APT_GET = 'printf "novels\\n" > "$2_1%3a2.0-1_all.deb"'
DPKG_DEB = 'mkdir "$3" && cp "$2" "$3/text"'


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is searched before all others, with the two programs in it; there are two packages."""
    folder = tmp_path / "bin"
    folder.mkdir()
    _install(folder, "apt-get", APT_GET)
    _install(folder, "dpkg-deb", DPKG_DEB)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    two = tuple(
        replace(SOURCES[0], package=name, version="1:2.0-1", sha256=SHA256) for name in ("old.books", "words")
    )
    monkeypatch.setattr(sources, "SOURCES", two)
    return folder


def _install(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def _changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last package is wanted in another version than apt-get has."""
    first, last = sources.SOURCES
    monkeypatch.setattr(sources, "SOURCES", (first, replace(last, version="1:1.9", sha256="0" * 64)))


def test_the_packages_are_those_of_the_shipped_card() -> None:
    card = (resolve_model(None).path / "README.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in card.splitlines() if re.match(r"\| `[\w.-]+` \| \S+\d \|", line)]
    assert [(row[0], row[1], row[4]) for row in rows] == [
        (f"| `{source.package}`", source.version, f"`{source.sha256}` |") for source in SOURCES
    ]


def test_what_is_missing_is_downloaded_and_unpacked_once(programs: Path, tmp_path: Path) -> None:
    fetch(tmp_path / "work", allow_other=False)
    assert (tmp_path / "work" / "old.books" / "text").read_bytes() == CONTENT
    rows = [(row["package"], row["version"], row["sha256"]) for row in provenance(tmp_path / "work")]
    assert rows == [("old.books", "1:2.0-1", SHA256), ("words", "1:2.0-1", SHA256)]
    for name in ("apt-get", "dpkg-deb"):
        _install(programs, name, "exit 1")
    fetch(tmp_path / "work", allow_other=False)


@pytest.mark.usefixtures("programs")
def test_another_package_is_refused_and_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _changed(monkeypatch)
    file = tmp_path / "work" / "words_1%3a2.0-1_all.deb"
    with pytest.raises(SourceError) as caught:
        fetch(tmp_path / "work", allow_other=False)
    assert str(caught.value) == (
        f"{file} has the SHA-256 {SHA256}; wanted {'0' * 64}, of words 1:1.9 (snapshot.debian.org has every "
        "version); put that file in its place, or give --allow-other-data to train on another text than the shipped "
        "checkpoint's"
    )
    assert not (tmp_path / "work" / "words").exists()


@pytest.mark.usefixtures("programs")
def test_another_package_that_is_allowed_is_in_the_provenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _changed(monkeypatch)
    fetch(tmp_path / "work", allow_other=True)
    assert (tmp_path / "work" / "words" / "text").read_bytes() == CONTENT
    assert provenance(tmp_path / "work")[1]["sha256"] == SHA256


@pytest.mark.parametrize(
    ("program", "script", "message"),
    [
        (
            "apt-get",
            'echo "Reading lists" >&2; echo "E: Unable to locate package $2" >&2; exit 100',
            "apt-get download old.books failed: E: Unable to locate package old.books; put old.books 1:2.0-1 into ",
        ),
        ("apt-get", "exit 0", r"wanted one old.books_*.deb in "),
        ("dpkg-deb", "mkdir $3; exit 2", ".partial failed: status 2; delete the file to download it again"),
    ],
)
def test_a_program_that_fails_is_one_line(
    program: str, script: str, message: str, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(programs, program, script)
    command = ["train_demo_checkpoint.py", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        train_demo_checkpoint.main()
    text = str(caught.value.code)
    assert text.startswith("train_demo_checkpoint.py: ")
    assert message in text
    assert "\n" not in text
    assert not (tmp_path / "work" / "packages" / "old.books").exists()


def test_a_machine_without_apt_get_is_told_what_to_do(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (programs / "apt-get").unlink()
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(SourceError, match=r"cannot be run: .*; put old\.books 1:2\.0-1 into .* yourself"):
        fetch(tmp_path / "work", allow_other=False)
