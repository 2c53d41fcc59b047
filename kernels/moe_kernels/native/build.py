"""Compile C and C++ source files into a shared library once, and find it again.

Imports the standard library alone, so that an installation can use it before torch is there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_COMPILERS = {".c": ("cc", "gcc", "clang"), ".cpp": ("c++", "g++", "clang++")}
_STANDARDS = {".c": "-std=c11", ".cpp": "-std=c++17"}
# No -march=native: the cache may lie in a home directory that machines of several kinds share.
# Without traps the compiler may turn the cases of a rounding into vector selects; results do not change.
_FLAGS = ("-O3", "-fno-trapping-math", "-fPIC", "-Wall")
_COMPILER_TIMEOUT_S = 300


class NativeBuildError(Exception):
    """The library cannot be had on this machine; the message says why, in a few words."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One source file and what it is compiled with; a file may be compiled several times, with other flags."""

    source: Path
    flags: tuple[str, ...] = ()  # beside those of every unit


def cache_dir() -> Path:
    """`$MOE_RUNTIME_CACHE/native`, else `~/.cache/moe_runtime/native`."""
    root = os.environ.get("MOE_RUNTIME_CACHE") or os.path.join(
        os.path.expanduser("~"), ".cache", "moe_runtime"
    )
    return Path(root) / "native"


def compiled(name: str, units: Sequence[Unit]) -> Path:
    """The library made from `units` and the headers beside them; several processes may ask for it at once.

    It is the installation's where that has it, else it lies in the cache and is compiled on first use.

    Raises:
        NativeBuildError: there is no compiler, it fails, or the cache cannot be written.
    """
    installed = units[0].source.parent / installed_name(name, units)
    if installed.exists():
        return installed
    compilers = _compilers(units)
    library = cache_dir() / f"{name}-{_key(units, compilers)}.so"
    if not library.exists():
        _build(units, compilers, library)
    return library


def installed_name(name: str, units: Sequence[Unit]) -> str:
    """The file name, beside the sources, of a library that was compiled when the package was installed.

    It holds a hash of the sources: an editable installation whose sources have changed since does not use it.
    """
    return f"{name}-{_hash([*_contents(units), *_FLAGS, platform.machine()])}.so"


def install(units: Sequence[Unit], library: Path) -> None:
    """Compile `units` into `library`. Raises NativeBuildError as `compiled` does."""
    _build(units, _compilers(units), library)


def _compilers(units: Sequence[Unit]) -> dict[str, str]:
    return {suffix: _compiler(suffix) for suffix in sorted({unit.source.suffix for unit in units})}


def _compiler(suffix: str) -> str:
    names = _COMPILERS[suffix]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        language = "C" if suffix == ".c" else "C++"
        raise NativeBuildError(f"no {language} compiler found (looked for {', '.join(names)})")
    return found


def _key(units: Sequence[Unit], compilers: dict[str, str]) -> str:
    """Hash of all that decides what the library holds and where it can run."""
    parts = _contents(units)
    for compiler in compilers.values():
        parts += [compiler, _run([compiler, "--version"])]
    return _hash([*parts, *_FLAGS, platform.machine(), *platform.libc_ver()])


def _contents(units: Sequence[Unit]) -> list[str]:
    parts: list[str] = []
    for unit in units:
        parts += [unit.source.name, unit.source.read_text(), *unit.flags]
    for folder in sorted({unit.source.parent for unit in units}):
        parts += [header.read_text() for header in sorted(folder.glob("*.h"))]
    return parts


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _build(units: Sequence[Unit], compilers: dict[str, str], library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-")
    except OSError as error:
        raise NativeBuildError(
            f"{library.parent} cannot be written ({error.strerror}); set MOE_RUNTIME_CACHE to a directory that can"
        ) from error
    with work as folder:

        def compile_unit(index: int) -> str:
            unit = units[index]
            suffix, target = unit.source.suffix, f"{folder}/{index}.o"
            flags = [_STANDARDS[suffix], *_FLAGS, *unit.flags]
            _run([compilers[suffix], *flags, "-c", str(unit.source), "-o", target])
            return target

        with ThreadPoolExecutor(max_workers=min(len(units), os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_unit, range(len(units))))
        linker = compilers.get(".cpp") or compilers[".c"]
        _run([linker, "-shared", *objects, "-o", f"{folder}/library.so"])
        os.replace(f"{folder}/library.so", library)  # processes that race see no library or a whole one


def _run(command: list[str]) -> str:
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILER_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{command[0]} cannot be run: {error}") from error
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or ["no message"]
        raise NativeBuildError(f"{command[0]} failed with status {process.returncode}: {lines[0]}")
    return process.stdout
