"""Where the source of the three packages lies, and which modules they have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"moe_kernels": ROOT / "kernels", "moe_models": ROOT / "models", "moe_runtime": ROOT}
PACKAGE_FOLDERS = [ROOT, ROOT / "kernels", ROOT / "models"]


def find_modules() -> dict[str, Path]:
    """File of every module of the three packages, by the module's dotted name."""
    return {
        module_name(file.relative_to(folder)): file
        for package, folder in PACKAGES.items()
        for file in _source_files(folder / package)
    }


def module_name(file: Path) -> str:
    """`moe_runtime/cache/__init__.py` is `moe_runtime.cache`; paths are relative to the folder on the path."""
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _source_files(package: Path) -> Iterator[Path]:
    assert (package / "__init__.py").is_file(), package
    return package.rglob("*.py")
