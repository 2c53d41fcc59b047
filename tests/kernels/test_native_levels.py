"""What keeps the native kernels' copies for different instruction sets apart: no CPU gets code that it cannot run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from moe_kernels import native
from moe_kernels.native.build import Unit, compiled, install
from moe_kernels.native.units import LEVELS, cpu_kernels, is_supported, level_flags

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
SOURCES = Path(str(native.__file__)).parent
pytestmark = [
    pytest.mark.skipif(not is_supported(), reason="the native kernels are for x86-64"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="no nm, which lists a library's symbols")


def _features(*flags: str) -> set[str]:
    """What the compiler's predefined macros say it may use, in small letters: {"avx2", "avx512bf16", ...}."""
    command = [str(COMPILER), *flags, "-x", "c++", "-dM", "-E", "/dev/null"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    names = [line.split()[1] for line in lines]
    # Two underscores at either end: what follows from a feature (__FP_FAST_FMA) has them at the front alone.
    return {name.replace("_", "").lower() for name in names if name.startswith("__") and name.endswith("__")}


@pytest.mark.parametrize("level", LEVELS)
def test_the_compiler_may_use_what_a_cpu_must_have_and_nothing_else(level: str) -> None:
    # Every CPU with AVX2 has what it implies (AVX, SSE 4.2). EVEX512 is a width of registers, which AVX-512F has.
    implied = {name for name in _features("-mavx2") if name != "avx2"} | {"evex256", "evex512"}
    assert _features(*level_flags(level)) - implied == {name.replace("_", "") for name in LEVELS[level]}


def _shared_symbols(library: Path) -> list[str]:
    """Functions and variables that the linker would have merged, had two copies each brought one.

    In the library they are local like all others, but neither in an unnamed namespace (_GLOBAL__N_), nor static
    (_ZL), nor of a copy's own name.
    """
    lines = subprocess.run(
        ["nm", str(library)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    names = [line.split()[-1] for line in lines if line.split()[-2] != "U"]
    assert any("_GLOBAL__N_" in name for name in names), f"{library} is stripped of its symbols"
    marks = ("_GLOBAL__N_", *(f"_{level}" for level in LEVELS))
    mangled = [
        name for name in names if name.startswith("_Z") and not name.startswith(("_ZL", "_ZZL", "_ZGVZL"))
    ]
    return sorted({name for name in mangled if not any(mark in name for mark in marks)})


@needs_nm
def test_no_two_levels_share_a_function() -> None:
    assert _shared_symbols(compiled("cpu_kernels", cpu_kernels())) == []


@needs_nm
@pytest.mark.parametrize(
    ("declared", "shared"),
    [
        ("inline {} int64_t twice(int64_t x) {{ return 2 * x; }}", ["_Z5twicel"]),
        ("template <class T> {} T twice(T x) {{ return 2 * x; }}", ["_Z5twiceIlET_S0_"]),
        ("static {} int64_t twice(int64_t x) {{ return 2 * x; }}", []),
        ("namespace {{ {} int64_t twice(int64_t x) {{ return 2 * x; }} }}", []),
    ],
)
def test_a_function_that_levels_share_is_found(declared: str, shared: list[str], tmp_path: Path) -> None:
    source = tmp_path / "copies.cpp"
    source.write_text(
        f'#include "{SOURCES}/level.h"\n'
        "namespace { __attribute__((noinline)) int64_t more(int64_t x) { return x + 1; } }\n"
        f"{declared.format('__attribute__((noinline))')}\n"
        "MOE_EXPORT(int64_t, moe_test)(int64_t x) { return twice(more(x)); }\n"
    )
    units = [Unit(source, (f"-DMOE_LEVEL={level}", *level_flags(level))) for level in ("avx2", "avx512")]
    install(units, tmp_path / "copies.so")
    assert _shared_symbols(tmp_path / "copies.so") == shared
