"""available_libraries: what a process can use, and the one warning where compiled kernels cannot be had."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path

import pytest

from moe_kernels import libraries
from moe_kernels.libraries import available_libraries
from moe_kernels.native import library
from moe_kernels.native.build import NativeBuildError


def _fails() -> None:
    raise NativeBuildError("no C++ compiler found (looked for c++, g++, clang++)")


def test_a_cpu_without_compiled_kernels_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "native_library", _fails)
    with caplog.at_level(logging.DEBUG):
        assert available_libraries("cpu") == frozenset()
    assert [(record.levelname, record.message) for record in caplog.records] == [
        (
            "WARNING",
            "no compiled CPU kernels: no C++ compiler found (looked for c++, g++, clang++); plain torch computes on "
            "this node, much slower",
        )
    ]


def test_a_rank_that_another_speaks_for_does_not_warn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "native_library", _fails)
    with caplog.at_level(logging.DEBUG):
        assert available_libraries("cpu", warn=False) == frozenset()
    assert not caplog.records


def test_a_cpu_with_compiled_kernels_is_quiet(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "native_library", lambda: None)
    with caplog.at_level(logging.DEBUG):
        assert available_libraries("cpu") == {"native"}
    assert not caplog.records


@pytest.mark.parametrize("installed", [set(), {"fla"}, {"fla", "flashinfer"}])
def test_a_gpu_has_the_libraries_that_are_installed(
    installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert available_libraries("cuda") == installed


@pytest.mark.parametrize("compiler", ["none", "CUDA_HOME", "CUDA_PATH", "default", "prebuilt"])
def test_flashinfer_is_taken_where_its_kernels_can_be_had(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    installed = {"flashinfer", *({"flashinfer_jit_cache"} if compiler == "prebuilt" else ())}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    default_home = tmp_path if compiler == "default" else tmp_path / "none"
    monkeypatch.setattr(libraries, "_DEFAULT_CUDA_HOME", str(default_home))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(variable, str(tmp_path if variable == compiler else tmp_path / "none"))
    assert available_libraries("cuda") == (set() if compiler == "none" else {"flashinfer"})
    assert ("flashinfer is installed, but its kernels are not" in caplog.text) == (compiler == "none")
