"""The native library: compiled once, by whoever comes first; without it ranks fall back to gloo and say so."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_kernels.native import build
from moe_kernels.native.build import NativeBuildError, Unit, cache_dir, compiled
from moe_runtime.errors import ConfigError
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.parallel.capacity import StepCapacity
from moe_runtime.parallel.dispatch import make_dispatchers
from moe_runtime.parallel.groups import ProcessGroups

SOURCE = "int answer(void) { return %d; }\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text(SOURCE % 42)
    return path


def test_callers_that_race_get_one_whole_library(source: Path) -> None:
    with ThreadPoolExecutor(max_workers=6) as pool:
        libraries = set(pool.map(compiled, ["answer"] * 6, [[Unit(source)]] * 6))
    assert len(libraries) == 1
    assert os.listdir(cache_dir()) == [libraries.pop().name]


def test_a_library_is_compiled_once_and_again_when_its_source_changes(source: Path) -> None:
    first = compiled("answer", [Unit(source)])
    made_at = first.stat().st_mtime_ns
    assert compiled("answer", [Unit(source)]) == first
    assert first.stat().st_mtime_ns == made_at
    source.write_text(SOURCE % 43)
    assert compiled("answer", [Unit(source)]) != first


def test_what_is_wrong_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.c"
    broken.write_text("int answer(void) { return }\n")
    with pytest.raises(NativeBuildError, match=r"cc failed with status 1: .*broken\.c"):
        compiled("broken", [Unit(broken)])
    assert os.listdir(cache_dir()) == []

    blocked = tmp_path / "file"
    blocked.write_text("")
    with monkeypatch.context() as patch:
        patch.setenv("MOE_RUNTIME_CACHE", str(blocked))
        with pytest.raises(NativeBuildError, match=r"cannot be written .*; set MOE_RUNTIME_CACHE"):
            compiled("answer", [Unit(source)])

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeBuildError, match=r"no C compiler found \(looked for cc, gcc, clang\)"):
        compiled("answer", [Unit(source)])


def _rank_without_compiler(rank: int, without: tuple[int, ...], folder: str) -> None:
    if rank in without:
        os.environ["PATH"] = folder
    build.installed_name = lambda *_: "none"  # an installation may have been made where there was a compiler
    os.environ["MOE_RUNTIME_CACHE"] = f"{folder}/cache-{rank}"
    log = Path(folder, f"log-{rank}")
    logging.basicConfig(filename=log, level=logging.WARNING)
    cpu = torch.device("cpu")
    groups = ProcessGroups.join(
        dist.FileStore(f"{folder}/store", 2), rank, 2, "127.0.0.1", cpu, timeout_s=60, same_host=True
    )
    assert groups.host is None
    warnings = [line for line in log.read_text().splitlines() if "memory" in line]
    assert len(warnings) == (rank == 0)
    if rank == 0:
        assert ("no C compiler found" in warnings[0]) == (0 in without)
    assert groups.agree([rank]) == [[0], [1]]
    placement = ExpertPlacement.contiguous(4, 2)
    capacity = StepCapacity(max_tokens=4, hidden_size=8, top_k=4, dtype=torch.float32)
    assert make_dispatchers("auto", groups, placement, capacity, cpu)[1].startswith("all_gather")
    with pytest.raises(ConfigError, match=r"dispatcher='shared_memory' needs .* a C compiler there"):
        make_dispatchers("shared_memory", groups, placement, capacity, cpu)
    groups.leave()


@pytest.mark.parametrize("without", [(0, 1), (1,)])
def test_ranks_without_a_compiler_are_joined_by_gloo_and_one_says_so(
    without: tuple[int, ...], tmp_path: Path
) -> None:
    mp.start_processes(_rank_without_compiler, args=(without, str(tmp_path)), nprocs=2, start_method="spawn")
