"""Progress bars of a start: what they say on stderr, and that they leave nothing."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
from tqdm import tqdm

from moe_runtime import progress
from moe_runtime.modelfiles import ModelFiles
from moe_runtime.progress import StartUpProgress
from moe_runtime.rank_spec import StartUpStep


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFiles:
    """A checkpoint of 1,000 bytes of weights; bars of one width are drawn at every step."""
    monkeypatch.setattr(progress, "tqdm", functools.partial(tqdm, mininterval=0, ncols=80, ascii=True))
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    return ModelFiles(name="m", path=tmp_path, config={}, generation_config={}, tokenizer_config=None)


def _drawn(text: str) -> list[str]:
    """Name and count of each bar that was drawn, in order; one drawn again as it was counts once."""
    bars = re.findall(r"(Loading weights|Compiling kernels): +(\d+)%\|[^|]*\| +(\S+)", text)
    return list(dict.fromkeys(f"{name} {share}% {count}" for name, share, count in bars))


def test_each_phase_has_a_bar_from_its_first_step_to_its_end(
    files: ModelFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    with StartUpProgress(files, disable=False) as bars:
        bars.update(StartUpStep("load", 250))
        bars.update(StartUpStep("load", 750))
        bars.update(StartUpStep("compile", 0, 2))
        shown = _drawn(capsys.readouterr().err)
        bars.update(StartUpStep("compile", 1, 2))
        bars.update(StartUpStep("compile", 1, 2))
        compiled = _drawn(capsys.readouterr().err)
    assert shown == [
        "Loading weights 0% 0.00/1.00k",
        "Loading weights 25% 250/1.00k",
        "Loading weights 100% 1.00k/1.00k",
        "Compiling kernels 0% 0/2",
    ]
    assert compiled == ["Compiling kernels 50% 1/2", "Compiling kernels 100% 2/2"]
    wiped = capsys.readouterr().err
    assert wiped
    assert re.sub(r"\s|\x1b\[A", "", wiped) == ""  # blanks over both bars, and the cursor back up


def test_a_total_grows_with_what_several_ranks_read(
    files: ModelFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    with StartUpProgress(files, disable=False) as bars:
        for _ in range(2):
            bars.update(StartUpStep("load", 600))
        assert _drawn(capsys.readouterr().err)[-1] == "Loading weights 100% 1.20k/1.20k"


def test_nothing_to_compile_has_no_bar(files: ModelFiles, capsys: pytest.CaptureFixture[str]) -> None:
    with StartUpProgress(files, disable=False) as bars:
        bars.update(StartUpStep("compile", 0, 0))
    assert capsys.readouterr().err == ""


def test_bars_that_are_not_wanted_write_nothing(
    files: ModelFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    with StartUpProgress(files, disable=True) as bars:
        bars.update(StartUpStep("load", 1000))
        bars.update(StartUpStep("compile", 1, 1))
    assert capsys.readouterr().err == ""
