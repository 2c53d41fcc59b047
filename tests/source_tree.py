"""Where the source of the three packages lies, and which modules they have."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Folder that has to be on Python's path for each package, relative to the root.
PACKAGES = {"moe_kernels": "kernels", "moe_models": "models", "moe_runtime": "."}


def package_folders(root: Path = ROOT) -> list[Path]:
    """What has to be on Python's path to import from the source tree at `root`."""
    return [root / folder for folder in PACKAGES.values()]


def find_modules(root: Path = ROOT) -> dict[str, Path]:
    """File of every module of the three packages in the source tree at `root`, by the module's dotted name."""
    return {
        _module_name(file.relative_to(folder)): file
        for package, folder in zip(PACKAGES, package_folders(root), strict=True)
        for file in (folder / package).rglob("*.py")
    }


def _module_name(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
