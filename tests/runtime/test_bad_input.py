"""Bad input on the command line: one line on stderr that names what was seen and the way out, exit status 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_runtime.cli.main import main
from moe_runtime.modelfiles import resolve_model

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo checkpoint, to break."""
    return Path(shutil.copytree(resolve_model(None).path, tmp_path / "model"))


def _truncate(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _without_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()


def _architecture(name: str) -> Callable[[Path], None]:
    def rewrite(checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": [name]}))

    return rewrite


def _broken_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"architectures": [}')


def _nothing(checkpoint: Path) -> None:
    pass


CASES = [
    ("no such directory", lambda c: shutil.rmtree(c), [], r"no such directory"),
    ("no safetensors", _without_weights, [], "no safetensors weights in"),
    ("truncated shard", _truncate, [], "model.safetensors is truncated: it should hold at least"),
    ("broken config", _broken_config, [], "config.json, line 1, column 20: not valid JSON"),
    (
        "unknown architecture",
        _architecture("Qwen3NextForCausalM"),
        [],
        "unknown architecture 'Qwen3NextForCausalM'; nearest: Qwen3NextForCausalLM",
    ),
    (
        "more ranks than experts",
        _nothing,
        ["--expert-parallel-size", "33"],
        "expert_parallel_size=33 is more than the 32 experts",
    ),
    (
        "more GPUs than there are",
        _nothing,
        ["--device", "cuda", "--expert-parallel-size", "4"],
        "needs 4 GPUs, the cluster has 0",
    ),
    ("no ranks", _nothing, ["--expert-parallel-size", "0"], "must be a whole number of at least 1, got 0"),
    ("unknown dtype", _nothing, ["--dtype", "bflat16"], "got 'bflat16'; did you mean 'bfloat16'?"),
    ("negative temperature", _nothing, ["--temperature", "-0.1"], "temperature must be at least 0, got -0.1"),
    (
        "no room for one sequence",
        _nothing,
        ["--kv-cache-memory-bytes", "1000"],
        "the cache budget of 1,000 bytes does not hold one sequence",
    ),
]


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """Exit status, and the lines of stderr that are ours."""
    try:
        status = main(arguments)
    except SystemExit as error:  # argparse's way
        status = int(str(error.code))
    lines = capsys.readouterr().err.splitlines()
    return status, [line for line in lines if line.startswith("moe-runtime")]


@pytest.mark.parametrize(
    ("break_it", "flags", "words"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_bad_input_is_refused_in_one_line(
    checkpoint: Path,
    break_it: Callable[[Path], None],
    flags: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_it(checkpoint)
    status, lines = _run(capsys, "generate", str(checkpoint), "--prompt", "x", *flags)
    assert status == 2
    (line,) = lines
    assert words in line


def test_bad_prompts_are_refused_in_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-model-len", "20"]
    status, (line,) = _run(capsys, "generate", str(checkpoint), "--prompt", "", *flags)
    assert (status, "the prompt is empty" in line) == (2, True)
    status, (line,) = _run(capsys, "generate", str(checkpoint), "--prompt", "many words " * 20, *flags)
    assert status == 2
    assert "but the model's length is 20" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--promt", "x"], "did you mean '--prompt'?"),
        (["generte"], "invalid choice: 'generte'"),
        (["generate", "--prompt", "x", "--max-tokens", "many"], "invalid int value: 'many'"),
        (["inspect", "--device-memory", "80XB"], "80XB"),
    ],
)
def test_bad_flags_are_refused_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, (line,) = _run(capsys, *arguments)
    assert status == 2
    assert words in line
