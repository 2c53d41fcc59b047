"""available_libraries: what a process can use, and the one warning where compiled kernels cannot be had."""

from __future__ import annotations

import importlib.util
import logging

import pytest

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
    assert available_libraries("cuda") == installed
