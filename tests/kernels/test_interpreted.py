"""Every Triton kernel against its reference under Triton's interpreter, in processes of their own, some at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
ROOT = FOLDER.parents[2]
INTERPRETER = {"TRITON_INTERPRET": "1"}

FILES = [
    # These also run with no interpreter, on a CPU's implementations.
    FOLDER.parent / "test_layer_operations.py",
    FOLDER.parent / "test_routing.py",
    ROOT / "tests" / "models" / "test_triton_model.py",
    *sorted(FOLDER.glob("test_*.py")),
]
# What takes longest has a process of its own, and starts first; starting one takes seconds.
_LONG = ("test_grouped_gemm", "test_triton_model", "test_layer_operations")
GROUPS = {
    **{name: [file for file in FILES if file.stem == name] for name in _LONG},
    "others": [file for file in FILES if file.stem not in _LONG],
}

Run = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Run]]]:
    """The groups that this session tests, as many at once as there are cores."""
    names = [
        item.callspec.params["group"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_interpreted.__name__
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {name: pool.submit(run_files, GROUPS[name], "not slow and not gpu") for name in names}


@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group: str, runs: dict[str, Future[Run]]) -> None:
    check(runs[group].result())


@pytest.mark.slow
def test_what_takes_long_interpreted() -> None:
    check(run_files(FILES, "slow and not gpu"))


def run_files(files: Sequence[Path], markers: str) -> Run:
    """Run files of tests in one process with the interpreter."""
    return run_pytest(INTERPRETER, "-m", markers, *map(str, files))


def run_pytest(env: Mapping[str, str], *arguments: str) -> Run:
    """pytest in a process of its own, with `env` beside what this process has."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        # More threads than one make the interpreter's small products ten times slower.
        env={**os.environ, **env, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def check(run: Run) -> None:
    """Its tests passed."""
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
