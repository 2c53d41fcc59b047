"""Manifest: what an inspection depended on, so that a later one can tell whether anything has changed.

Source files outside versioned distributions are kept by their hash, distributions by their own record, and the
directories that modules are looked for in by the names of what they hold (a new file can shadow a module).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import site
import sys
import sysconfig
from collections.abc import Iterable
from typing import Any

_MODULE_SUFFIXES = (".py", ".pyc", ".so", ".pyd", ".zip", ".egg-link", ".pth")


class SourceRecorder:
    """Notes the file of every code object that this process executes at module level, from `start` on.

    `sys.modules` alone would miss a file that was executed by hand, or whose module was taken out again.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()

    def start(self) -> None:
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "exec":
            file = getattr(args[0], "co_filename", "")
            if os.path.isabs(file):
                self.files.add(file)


def machine_identity() -> str:
    """Names this machine across restarts; paths in a manifest mean nothing on another."""
    parts = [platform.node()]
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            with open(path, encoding="ascii") as file:
                parts.append(file.read().strip())
                break
        except OSError:
            continue
    return ":".join(parts)


def collect(executed: Iterable[str], started_ns: int) -> dict[str, Any] | None:
    """The manifest of this process, or None where something that it loaded cannot be verified later.

    Args:
        executed: files that a `SourceRecorder` has seen.
        started_ns: wall clock at which the process started; a file that changed since may have been read
            before the change.
    """
    files, distributions = _split(_loaded_files() | set(executed))
    hashes: dict[str, str] = {}
    for file in sorted(files):
        digest = _hash_file(file)
        if digest is None or os.stat(file).st_mtime_ns >= started_ns:
            return None
        hashes[file] = digest
    folders = dict.fromkeys(os.path.abspath(p) for p in sys.path)
    return {
        "machine": machine_identity(),
        "files": hashes,
        "distributions": {path: _record_stamp(path) for path in sorted(distributions)},
        "folders": {path: _names_hash(path) for path in folders if _is_searched(path)},
    }


def is_current(manifest: dict[str, Any]) -> bool:
    """Whether everything in the manifest is here and as it was."""
    if manifest["machine"] != machine_identity():
        return False
    return (
        all(_hash_file(path) == digest for path, digest in manifest["files"].items())
        and all(_record_stamp(path) == stamp for path, stamp in manifest["distributions"].items())
        and all(_names_hash(path) == digest for path, digest in manifest["folders"].items())
    )


def _loaded_files() -> set[str]:
    found = set()
    for module in list(sys.modules.values()):
        # Some modules are objects that answer any attribute; a made-up relative name is no file.
        file = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(file, str) and os.path.isabs(file):
            found.add(file)
    return found


def _split(files: set[str]) -> tuple[set[str], set[str]]:
    """Files to hash, and the `.dist-info` folders of the distributions that hold the others."""
    stdlib, site_dirs = _stdlib_dirs(), _site_dirs()
    loose: set[str] = set()
    by_top: dict[tuple[str, str], set[str]] = {}
    for file in files:
        folder = next((d for d in site_dirs if _under(file, [d])), None)
        if folder is not None:
            top = os.path.relpath(file, folder).split(os.sep)[0].split(".")[0]
            by_top.setdefault((folder, top), set()).add(file)
        elif not _under(file, stdlib):
            loose.add(file)
    distributions: set[str] = set()
    owners = _distributions_by_top_level()
    for (folder, top), members in by_top.items():
        owned = {p for p in owners.get(top, ()) if os.path.dirname(p) == folder}
        distributions |= owned
        if not owned:
            loose |= members
    return loose, distributions


def _distributions_by_top_level() -> dict[str, set[str]]:
    """Import name to the metadata folders of the distributions that install it."""
    folders: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        path = getattr(distribution, "_path", None)  # the only way to learn where the metadata lies
        if path is not None:
            folders.setdefault(distribution.metadata["Name"], os.path.abspath(str(path)))
    return {
        top: {folders[name] for name in names if name in folders}
        for top, names in importlib.metadata.packages_distributions().items()
    }


def _stdlib_dirs() -> list[str]:
    return [os.path.abspath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]


def _site_dirs() -> list[str]:
    """Where distributions are installed. They often lie inside the standard library's folder: ask them first."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        places.append(site.getusersitepackages())
    return list(dict.fromkeys(os.path.abspath(p) for p in places))


def _is_searched(folder: str) -> bool:
    """Whether modules other than the standard library's are looked for in it."""
    return _under(folder, _site_dirs()) or not _under(folder, _stdlib_dirs())


def _under(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder + os.sep) for folder in folders)


def _hash_file(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return None


def _record_stamp(dist_info: str) -> list[int] | None:
    """Size and time of a distribution's record: a reinstallation of the same version writes it anew."""
    for name in ("RECORD", "PKG-INFO", "METADATA"):
        try:
            stat = os.stat(os.path.join(dist_info, name))
        except OSError:
            continue
        return [stat.st_size, stat.st_mtime_ns]
    return None


def _names_hash(folder: str) -> str | None:
    """Hash of the names in a folder that an import could find."""
    try:
        with os.scandir(folder) as entries:
            names = [
                entry.name
                for entry in entries
                if entry.name.endswith(_MODULE_SUFFIXES)
                or (entry.name.isidentifier() and os.path.exists(os.path.join(entry.path, "__init__.py")))
            ]
    except OSError:
        return None
    return hashlib.sha256("\0".join(sorted(names)).encode()).hexdigest()
