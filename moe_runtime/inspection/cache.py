"""Cache of successful inspections: a JSON file a key, believed only while its manifest still holds."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_runtime import __version__
from moe_runtime.inspection.manifest import is_current
from moe_runtime.inspection.model_info import ModelInfo

_FORMAT = 1  # of an entry; raised when its meaning changes
_MAX_ENTRIES = 200


def cache_dir() -> Path:
    """`$MOE_RUNTIME_CACHE/inspection`, else `~/.cache/moe_runtime/inspection`."""
    root = os.environ.get("MOE_RUNTIME_CACHE") or os.path.join(
        os.path.expanduser("~"), ".cache", "moe_runtime"
    )
    return Path(root) / "inspection"


def cache_key(request: Mapping[str, Any], tokenizer: Mapping[str, Any], runtime_env: object) -> str:
    """Hash of all that decides an inspection's result apart from the source files, which the manifest covers."""
    parts = {
        "format": _FORMAT,
        "request": request,
        "tokenizer": tokenizer,
        "moe_runtime": __version__,
        "torch": _version("torch"),
        "python": sys.version,
        "prefix": sys.prefix,
        "sys_path": _search_path(),
        "runtime_env": [runtime_env, _job_runtime_env(), os.environ.get("RAY_ADDRESS")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def lookup(key: str) -> ModelInfo | None:
    """The cached answer; None where there is none, it cannot be read, or anything it rests on has changed."""
    try:
        entry = json.loads((cache_dir() / f"{key}.json").read_text())
        return ModelInfo.from_dict(entry["info"]) if is_current(entry["manifest"]) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def store(key: str, info: ModelInfo, manifest: Mapping[str, Any]) -> None:
    """Keep an answer. A cache that cannot be written is no reason to fail."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump({"info": info.to_dict(), "manifest": manifest}, file)
        os.replace(temporary, folder / f"{key}.json")  # readers see the old entry or the new one
        _prune(folder)
    except OSError:
        return


def _prune(folder: Path) -> None:
    entries = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in entries[_MAX_ENTRIES:]:
        path.unlink(missing_ok=True)


def _search_path() -> list[str]:
    """`sys.path` without the folders that importing Ray adds: whether it has been imported must not matter."""
    return [p for p in map(os.path.abspath, sys.path) if os.path.basename(p) != "thirdparty_files"]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _job_runtime_env() -> object:
    """The runtime environment of this driver's job; Ray is asked only where it is running already."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return dict(ray.get_runtime_context().runtime_env)
    return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env", {})
