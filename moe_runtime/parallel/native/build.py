"""Compile a C source file into a shared library once, and find it again."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_COMPILERS = ("cc", "gcc", "clang")
# No -march=native: the cache may lie in a home directory that machines of several kinds share.
# Without traps the compiler may turn the cases of a rounding into vector selects; results do not change.
_FLAGS = ("-std=c11", "-O3", "-fno-trapping-math", "-fPIC", "-shared", "-Wall")
_COMPILER_TIMEOUT_S = 120


class NativeBuildError(Exception):
    """The library cannot be had on this machine; the message says why, in a few words."""


def cache_dir() -> Path:
    """`$MOE_RUNTIME_CACHE/native`, else `~/.cache/moe_runtime/native`."""
    root = os.environ.get("MOE_RUNTIME_CACHE") or os.path.join(
        os.path.expanduser("~"), ".cache", "moe_runtime"
    )
    return Path(root) / "native"


def compiled(source: Path) -> Path:
    """The library made from `source` and the headers beside it; several processes may ask for it at once.

    Raises:
        NativeBuildError: there is no compiler, it fails, or the cache cannot be written.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise NativeBuildError(f"no C compiler found (looked for {', '.join(_COMPILERS)})")
    library = cache_dir() / f"{source.stem}-{_key(source, compiler)}.so"
    if not library.exists():
        _compile(source, compiler, library)
    return library


def _key(source: Path, compiler: str) -> str:
    """Hash of all that decides what the library holds and where it can run."""
    version = _run([compiler, "--version"])
    parts = (
        source.read_text(),
        compiler,
        version,
        " ".join(_FLAGS),
        platform.machine(),
        *platform.libc_ver(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _compile(source: Path, compiler: str, library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=library.parent, suffix=".so.tmp")
        os.close(handle)
    except OSError as error:
        raise NativeBuildError(
            f"{library.parent} cannot be written ({error.strerror}); set MOE_RUNTIME_CACHE to a directory that can"
        ) from error
    try:
        _run([compiler, *_FLAGS, str(source), "-o", temporary])
        os.replace(temporary, library)  # ranks that race see no library or a whole one
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILER_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"{command[0]} cannot be run: {error}") from error
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or ["no message"]
        raise NativeBuildError(f"{command[0]} failed with status {process.returncode}: {lines[0]}")
    return process.stdout
