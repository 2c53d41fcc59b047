"""Where the training text comes from: Debian packages, which are downloaded and unpacked, not installed."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ARCHIVE = "snapshot.debian.org"


class SourceError(Exception):
    """A package that cannot be had, or is another one than the shipped checkpoint was trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A Debian package that ships text, and the terms of that text."""

    package: str
    version: str  # of the package that the shipped checkpoint was trained on
    sha256: str  # of that package
    text: str  # what is read
    licence: str


SOURCES = (
    Source(
        package="r-cran-janeaustenr",
        version="1.0.0-1",
        sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        text="the six novels of Jane Austen (Project Gutenberg's transcriptions)",
        licence="public domain; the package MIT",
    ),
    Source(
        package="wordnet-base",
        version="1:3.0-37",
        sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        text="WordNet 3.0's glosses and examples",
        licence="WordNet 3.0 license",
    ),
    Source(
        package="python3.11-doc",
        version="3.11.2-6+deb12u9",
        sha256="5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
        text="Python's documentation: library, tutorial, reference, how-tos, questions, glossary",
        licence="PSF License Agreement, version 2; examples also 0BSD",
    ),
    Source(
        package="dict-jargon",
        version="4.4.7-3.1",
        sha256="405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
        text="the Jargon File 4.4.7",
        licence="public domain",
    ),
    Source(
        package="dict-devil",
        version="1.0-13.1",
        sha256="6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
        text="Ambrose Bierce's Devil's Dictionary (1911)",
        licence="public domain",
    ),
)


def fetch(directory: Path, *, allow_other: bool) -> None:
    """Download and unpack the packages that `directory` lacks; needs apt-get and dpkg-deb.

    Args:
        allow_other: take a package whose SHA-256 is not the source's.

    Raises:
        SourceError: a package cannot be downloaded or unpacked, or is another one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        archive = archive_of(directory, source)
        seen = sha256(archive)
        if seen != source.sha256 and not allow_other:
            raise SourceError(
                f"{archive} has the SHA-256 {seen}; wanted {source.sha256}, of {source.package} {source.version} "
                f"({ARCHIVE} has every version); put that file in its place, or give --allow-other-data to train on "
                "another text than the shipped checkpoint's"
            )
        if not (directory / source.package).is_dir():
            unpack(archive, directory / source.package)


def archive_of(directory: Path, source: Source) -> Path:
    """The package's archive; where there is none, the one that this machine's apt-get knows is downloaded."""
    pattern = f"{source.package}_*.deb"
    if not any(directory.glob(pattern)):
        way_out = (
            f"put {source.package} {source.version} into {directory} yourself ({ARCHIVE} has it), or run this where "
            "apt-get finds it, on Debian 12"
        )
        run(["apt-get", "download", source.package], directory, way_out)
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise SourceError(f"wanted one {pattern} in {directory}, found {[path.name for path in found]}")
    return found[0]


def unpack(archive: Path, directory: Path) -> None:
    """Unpack an archive, whole or not at all."""
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    run(
        ["dpkg-deb", "-x", str(archive), str(partial)], archive.parent, "delete the file to download it again"
    )
    partial.rename(directory)


def run(command: list[str], directory: Path, way_out: str) -> None:
    """Run a program in `directory`; SourceError with its last words if it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SourceError(f"{' '.join(command)} cannot be run: {error}; {way_out}") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise SourceError(f"{' '.join(command)} failed: {said}; {way_out}")


def sha256(file: Path) -> str:
    """Of the whole file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def provenance(directory: Path) -> list[dict[str, str]]:
    """For each package its name, version, what it holds, its licence and the archive's SHA-256."""
    rows = []
    for source in SOURCES:
        archive = archive_of(directory, source)
        rows.append(
            {
                "package": source.package,
                "version": archive.name.split("_")[1].replace("%3a", ":"),
                "text": source.text,
                "licence": source.licence,
                "sha256": sha256(archive),
            }
        )
    return rows


def r_character_vectors(file: Path) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database (.rdb), each from its own compressed record.

    A record is a big-endian length, then a zlib stream of R's XDR serialization: a header, the type and
    length of the vector, and for each string a flag word, its length in bytes (-1 for NA) and its bytes.
    """
    data, at = file.read_bytes(), 0
    while at < len(data):
        stream = zlib.decompressobj()
        record = stream.decompress(data[at + 4 :])
        at = len(data) - len(stream.unused_data)
        (encoding,) = struct.unpack_from(">i", record, 14)  # after "X\n" and three versions
        offset = 18 + encoding
        kind, length = struct.unpack_from(">Ii", record, offset)
        if kind & 0xFF != 16:  # STRSXP
            continue
        offset += 8
        strings = []
        for _ in range(length):
            (size,) = struct.unpack_from(">i", record, offset + 4)
            strings.append(record[offset + 8 : offset + 8 + max(size, 0)].decode("utf-8"))
            offset += 8 + max(size, 0)
        yield strings
