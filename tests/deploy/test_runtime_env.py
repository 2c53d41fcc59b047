"""runtime_env.yaml sends the code that a job needs, and nothing else, by Ray's own packaging."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.runtime_env import RuntimeEnv

from tests.source_tree import ROOT

DEMO_WEIGHTS = "moe_runtime/demo_checkpoint/model.safetensors"
MOST_BYTES = 5 << 20  # beside the demo checkpoint's weights


@pytest.fixture(scope="module")
def runtime_env() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "runtime_env.yaml").read_text())


@pytest.fixture(scope="module")
def sent(runtime_env: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Name and bytes of every file that travels from a checkout in which somebody works."""
    folder = tmp_path_factory.mktemp("job")
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "build")
    checkout = Path(shutil.copytree(ROOT, folder / "checkout", ignore=ignored))
    for name in (".git/objects/pack", ".venv/bin/python", "checkpoint/model-00001-of-00041.safetensors"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(b"x")
    package = folder / "package.zip"
    create_package(str(checkout), package, include_gitignore=True, excludes=runtime_env["excludes"])
    return {
        file.filename: file.file_size for file in zipfile.ZipFile(package).infolist() if not file.is_dir()
    }


def test_ray_knows_every_key(runtime_env: dict[str, Any]) -> None:
    RuntimeEnv(**runtime_env)
    assert set(runtime_env) <= RuntimeEnv.known_fields


def test_all_of_the_packages_travels(sent: dict[str, int]) -> None:
    for package in ("moe_runtime", "kernels/moe_kernels", "models/moe_models"):
        files = [
            path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        missing = {str(file.relative_to(ROOT)) for file in files if file.suffix != ".so"} - set(sent)
        assert not missing


def test_what_a_job_has_no_use_for_stays(sent: dict[str, int]) -> None:
    top_level = {name.split("/")[0] for name in sent}
    assert top_level.isdisjoint({".git", ".ci", ".venv", "tests", "docs", "scripts", "deploy", "checkpoint"})
    assert sum(sent.values()) - sent[DEMO_WEIGHTS] < MOST_BYTES


def test_every_folder_that_is_left_out_is_there(runtime_env: dict[str, Any]) -> None:
    folders = [pattern[1:] for pattern in runtime_env["excludes"] if pattern.startswith("/")]
    assert [name for name in folders if name != ".git" and not (ROOT / name).is_dir()] == []
