"""The distribution, and the three ways to run the code: a wheel, an editable install, a bare checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from tests.source_tree import PACKAGES, ROOT, find_modules, package_folders

SITE_PACKAGES = sysconfig.get_path("purelib")
FILES_OF_PACKAGES = f"[m.__file__ for m in map(__import__, {list(PACKAGES)})]"


def _run(*command: str | Path, cwd: Path, **env: str) -> str:
    """What a program that must succeed prints; PYTHONPATH and Ray's address are those in `env`, or none."""
    inherited = {name: v for name, v in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    process = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as a fresh checkout has it: building in it leaves nothing in ours."""
    copy = tmp_path_factory.mktemp("fresh") / "checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "*.so")
    return Path(shutil.copytree(ROOT, copy, ignore=ignored))


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the environment's own setuptools, which torch requires to be new enough, so with no network."""
    directory = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(checkout, directory / "source")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        directory,
    ]
    _run(*build, copy, cwd=directory)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    _run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def _run_installed(installed: Path, program: str) -> str:
    """Run Python with the installed wheel and our dependencies, but without what .pth files install."""
    path = f"import sys; sys.path += [{str(installed)!r}, {SITE_PACKAGES!r}]\n"
    return _run(sys.executable, "-I", "-S", "-c", path + program, cwd=installed)


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel: Path, checkout: Path) -> None:
    expected = {
        file.relative_to(folder).as_posix()
        for package, folder in zip(PACKAGES, package_folders(checkout), strict=True)
        for file in (folder / package).rglob("*")
        if file.is_file()
    }
    assert expected >= {f"{package}/py.typed" for package in PACKAGES}
    assert expected >= {
        f"moe_runtime/demo_checkpoint/{name}" for name in ("config.json", "model.safetensors")
    }

    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    libraries = {name for name in names if name.endswith(".so")}
    assert names - libraries == expected
    assert {name.partition("-")[0] for name in libraries} == {
        "moe_kernels/native/cpu_kernels",
        "moe_runtime/parallel/native/host_link",
    }


def test_the_installed_wheel_compiles_nothing(installed: Path, tmp_path: Path) -> None:
    program = """
from moe_kernels.native.library import native_library
from moe_runtime.parallel.host_library import host_library
print(native_library()._name)
print(host_library()._name)
"""
    program = f"import os\nos.environ['MOE_RUNTIME_CACHE'] = {str(tmp_path / 'cache')!r}\n{program}"
    for library in _run_installed(installed, program).split():
        assert Path(library).is_relative_to(installed)
    assert not (tmp_path / "cache").exists()


def test_a_wheel_is_built_where_there_is_no_compiler(checkout: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkout, tmp_path / "source")
    build = "import setuptools.build_meta as b; b.build_wheel('..')"
    _run(sys.executable, "-c", build, cwd=source, PATH=str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_the_wheel_declares_its_command_and_top_level_names(wheel: Path) -> None:
    def read(name: str) -> str:
        archive = zipfile.ZipFile(wheel)
        (path,) = [path for path in archive.namelist() if path.endswith(f".dist-info/{name}")]
        return archive.read(path).decode()

    entry_points = ConfigParser()
    entry_points.read_string(read("entry_points.txt"))
    assert dict(entry_points["console_scripts"]) == {"moe-runtime": "moe_runtime.cli.main:main"}
    assert read("top_level.txt").split() == sorted(PACKAGES)
    assert "Apache License" in read("licenses/LICENSE")


def test_every_module_of_the_installed_wheel_imports(installed: Path, checkout: Path) -> None:
    modules = sorted(find_modules(checkout))
    program = f"""
import importlib, json
from importlib.metadata import version
files = [importlib.import_module(name).__file__ for name in {modules}]
from moe_runtime import __version__
from moe_runtime.modelfiles import resolve_model
print(json.dumps([files, str(resolve_model(None).path), __version__ == version("moe-runtime")]))
"""
    files, demo, same_version = json.loads(_run_installed(installed, program))

    assert [file for file in files if not Path(file).is_relative_to(installed)] == []
    assert Path(demo) == installed / "moe_runtime" / "demo_checkpoint"
    assert same_version, "version in pyproject.toml is not moe_runtime.__version__"


def test_the_command_of_the_installed_wheel_runs(installed: Path) -> None:
    program = """
from importlib.metadata import entry_points
(command,) = entry_points(group="console_scripts", name="moe-runtime")
command.load()(["--version"])
"""
    assert _run_installed(installed, program).startswith("moe-runtime ")


def test_the_editable_install_exposes_our_packages_and_not_their_folders(tmp_path: Path) -> None:
    program = f"""
import importlib.util, json
from importlib.metadata import distribution
places = {{}}
for name in {[*PACKAGES, "kernels", "models", "tests", "scripts"]}:
    spec = importlib.util.find_spec(name)
    places[name] = [] if spec is None else [*(spec.submodule_search_locations or [spec.origin])]
print(json.dumps([json.loads(distribution("moe-runtime").read_text("direct_url.json") or "{{}}"), places]))
"""
    origin, places = json.loads(_run(sys.executable, "-c", program, cwd=tmp_path))
    if not origin.get("dir_info", {}).get("editable"):
        pytest.skip("moe_runtime is not installed with `pip install -e`")
    source = Path(unquote(urlparse(origin["url"]).path))

    for package, folder in PACKAGES.items():
        assert places.pop(package) == [str(source / folder / package)]
    for name, found in places.items():
        assert not any(Path(place).is_relative_to(source) for place in found), f"import {name} finds {found}"


@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "--help"], ["generate", "--help"]])
def test_the_driver_runs_from_a_checkout_that_is_not_installed(checkout: Path, arguments: list[str]) -> None:
    # -S leaves .pth files aside, the editable install's among them; the dependencies are put back by hand.
    path = os.pathsep.join([_runtime_env(checkout)["env_vars"]["PYTHONPATH"], SITE_PACKAGES])
    python = [sys.executable, "-S"]

    output = _run(*python, "-m", "moe_runtime", *arguments, cwd=checkout, PYTHONPATH=path)
    files = _run(*python, "-c", f"print(*{FILES_OF_PACKAGES})", cwd=checkout, PYTHONPATH=path).split()

    assert "moe-runtime" in output
    assert [(checkout / file).resolve() for file in files] == _files_of_packages(checkout)


@pytest.mark.ray
def test_ray_workers_import_from_the_uploaded_working_directory(checkout: Path, tmp_path: Path) -> None:
    """Also where another checkout is installed on the workers, as ours is here."""
    environment = {"working_dir": str(checkout), **_runtime_env(checkout)}
    program = f"""
import json, os, subprocess, sys
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={environment})

@ray.remote
def locate():
    child = [sys.executable, "-c", "print(*{FILES_OF_PACKAGES})"]
    in_child = subprocess.run(child, capture_output=True, text=True, check=True).stdout.split()
    return os.getcwd(), {FILES_OF_PACKAGES}, in_child

print(json.dumps(ray.get(locate.remote(), timeout=60)))
ray.shutdown()
"""
    output = _run(sys.executable, "-c", program, cwd=tmp_path)
    working_directory, files, files_in_child = json.loads(output.splitlines()[-1])

    uploaded = Path(working_directory)
    assert not uploaded.is_relative_to(ROOT)
    assert not uploaded.is_relative_to(checkout)
    assert [Path(file) for file in files] == _files_of_packages(uploaded)
    assert [Path(file) for file in files_in_child] == _files_of_packages(uploaded)


def _runtime_env(checkout: Path) -> dict[str, dict[str, str]]:
    import yaml  # comes with Ray

    return yaml.safe_load((checkout / "runtime_env.yaml").read_text())


def _files_of_packages(checkout: Path) -> list[Path]:
    return [checkout / folder / package / "__init__.py" for package, folder in PACKAGES.items()]
