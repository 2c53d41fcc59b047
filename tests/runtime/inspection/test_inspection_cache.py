"""The cache: a hit needs no Ray, and anything that the answer rests on makes a miss when it changes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.errors import ModelImportError
from moe_runtime.inspection import ModelInfo, inspect_model, manifest, remote
from moe_runtime.inspection.task import run_inspection

FIXTURES = Path(__file__).parent / "fixtures"


class InspectedError(Exception):
    """Stands for an inspection: the cache had no answer."""


@dataclass
class Warm:
    """A model's source and configuration, and a cache that holds its answer."""

    source: Path
    model: Path
    cache: Path

    def inspect(self, **options: Any) -> ModelInfo:
        return inspect_model(self.model, model_class="tiny_moe:TinyForCausalLM", **options)

    @property
    def entry(self) -> Path:
        (path,) = self.cache.glob("inspection/*.json")
        return path


def _inspect_here(
    request: Mapping[str, Any], timeout_s: float, runtime_env: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The inspection as the Ray task runs it, in this process's own environment."""
    reply = run_inspection(request, timeout_s)
    if not reply["ok"]:
        raise ModelImportError(reply["message"])
    return reply


def _refuse(*args: object) -> dict[str, Any]:
    raise InspectedError


def _lay_out(folder: Path) -> Warm:
    warm = Warm(folder / "source", folder / "model", folder / "cache")
    warm.source.mkdir()
    warm.model.mkdir()
    for name in ("tiny_base.py", "tiny_layer.py", "tiny_moe.py"):
        shutil.copy(FIXTURES / name, warm.source)
    shutil.copy(FIXTURES / "tiny_config.json", warm.model / "config.json")
    return warm


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Inspected once for the whole module; `warm` hands it out and puts it back as it was."""
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        warm = _lay_out(folder)
        patch.syspath_prepend(str(warm.source))
        patch.setenv("MOE_RUNTIME_CACHE", str(warm.cache))
        patch.setattr(remote, "inspect_remotely", _inspect_here)
        warm.inspect()
        shutil.copytree(folder, folder.with_name("pristine"))
        yield folder


@pytest.fixture
def warm(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Warm]:
    """The filled cache, in a process where every inspection raises `InspectedError`."""
    monkeypatch.setenv("MOE_RUNTIME_CACHE", str(filled / "cache"))
    monkeypatch.setattr(remote, "inspect_remotely", _refuse)
    yield Warm(filled / "source", filled / "model", filled / "cache")
    shutil.rmtree(filled)
    shutil.copytree(filled.with_name("pristine"), filled)


def test_unchanged_model_is_a_hit(warm: Warm) -> None:
    info = warm.inspect()
    assert info.parameters["expert"] == 480
    assert info.tokenizer.eos_token_ids == (7, 9)


def test_warnings_and_facts_are_kept_with_the_answer(warm: Warm) -> None:
    assert warm.inspect() == ModelInfo.from_dict(json.loads(warm.entry.read_text())["info"])


def _append(file: str) -> Callable[[Warm], None]:
    def edit(warm: Warm) -> None:
        path = warm.source / file
        path.write_text(path.read_text() + "\n# a change\n")

    return edit


def _set_config(warm: Warm) -> None:
    path = warm.model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": 6}))


def _edit_entry(change: Callable[[dict[str, Any]], object]) -> Callable[[Warm], None]:
    def edit(warm: Warm) -> None:
        entry = json.loads(warm.entry.read_text())
        change(entry)
        warm.entry.write_text(json.dumps(entry))

    return edit


def _truncate(warm: Warm) -> None:
    warm.entry.write_text(warm.entry.read_text()[:300])


CHANGES: dict[str, Callable[[Warm], object]] = {
    "the model's own file": _append("tiny_moe.py"),
    "the base class's file": _append("tiny_base.py"),
    "the composed layer's file": _append("tiny_layer.py"),
    "a source file is gone": lambda warm: (warm.source / "tiny_layer.py").unlink(),
    "a new file that could shadow a module": lambda warm: (warm.source / "triton.py").write_text(""),
    "config.json": _set_config,
    "tokenizer_config.json": lambda warm: (warm.model / "tokenizer_config.json").write_text(
        '{"eos_token": "<end>"}'
    ),
    "a chat template": lambda warm: (warm.model / "chat_template.jinja").write_text("{{ messages }}"),
    "a truncated entry": _truncate,
    "an entry that is no object": lambda warm: warm.entry.write_text("[]"),
    "an entry without a manifest": _edit_entry(lambda entry: entry.pop("manifest")),
    "an entry of another shape": _edit_entry(lambda entry: entry["info"].pop("num_experts")),
    "another machine": _edit_entry(lambda entry: entry["manifest"].update(machine="elsewhere:0123")),
    "another version of a distribution": _edit_entry(
        lambda entry: entry["manifest"]["distributions"].update({"/nowhere/torch-1.0.dist-info": [1, 2]})
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_change_is_a_miss(warm: Warm, change: Callable[[Warm], object]) -> None:
    warm.inspect()
    change(warm)
    with pytest.raises(InspectedError):
        warm.inspect()


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"runtime_env": {"env_vars": {"A": "1"}}}, {"use_cache": False}],
    ids=str,
)
def test_other_options_are_a_miss(warm: Warm, options: dict[str, Any]) -> None:
    with pytest.raises(InspectedError):
        warm.inspect(**options)


def test_other_search_path_is_a_miss(warm: Warm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InspectedError):
        warm.inspect()


def test_manifest_covers_bases_layers_and_our_own_checkout(warm: Warm) -> None:
    content = json.loads(warm.entry.read_text())["manifest"]
    names = {Path(file).name for file in content["files"]}
    assert {"tiny_moe.py", "tiny_base.py", "tiny_layer.py"} <= names
    interfaces = (
        sys.modules["moe_models.interfaces"].__file__ if "moe_models.interfaces" in sys.modules else None
    )
    if interfaces is not None and "site-packages" not in interfaces:
        assert interfaces in content["files"]
    assert any(Path(path).name.startswith("torch-") for path in content["distributions"])
    assert not any("/torch/" in file for file in content["files"])


def test_edited_layer_gives_the_new_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm = _lay_out(tmp_path)
    monkeypatch.syspath_prepend(str(warm.source))
    monkeypatch.setattr(remote, "inspect_remotely", _inspect_here)
    assert warm.inspect().parameters["expert"] == 480
    layer = warm.source / "tiny_layer.py"
    layer.write_text(layer.read_text().replace("2 * intermediate_size", "3 * intermediate_size"))
    assert warm.inspect().parameters["expert"] == 480 + 5 * 4 * 8


def test_failure_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm = _lay_out(tmp_path)
    monkeypatch.syspath_prepend(str(warm.source))
    monkeypatch.setattr(remote, "inspect_remotely", _inspect_here)
    good = (warm.source / "tiny_base.py").read_text()
    (warm.source / "tiny_base.py").write_text("import a_module_that_nobody_has\n")
    with pytest.raises(ModelImportError):
        warm.inspect()
    (warm.source / "tiny_base.py").write_text(good)
    assert warm.inspect().parameters["expert"] == 480


def test_file_that_changed_during_the_inspection_is_not_verifiable(tmp_path: Path) -> None:
    file = tmp_path / "edited.py"
    file.write_text("x = 1\n")
    changed_ns = file.stat().st_mtime_ns
    assert manifest.collect([str(file)], changed_ns) is None
    assert manifest.collect([str(file)], changed_ns + 10**12) is not None


def test_file_executed_by_hand_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "by_hand.py").write_text("x = 1\n")
    script = f"""
import runpy
from moe_runtime.inspection.manifest import SourceRecorder
recorder = SourceRecorder()
recorder.start()
runpy.run_path({str(tmp_path / "by_hand.py")!r})
print({str(tmp_path / "by_hand.py")!r} in recorder.files)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "True"


def test_reinstalled_distribution_is_a_change(tmp_path: Path) -> None:
    folder = tmp_path / "thing-1.0.dist-info"
    folder.mkdir()
    (folder / "RECORD").write_text("thing.py,sha256=a,1\n")
    before = {
        "machine": manifest.machine_identity(),
        "files": {},
        "folders": {},
        "distributions": {str(folder): manifest._record_stamp(str(folder))},
    }
    assert manifest.is_current(before)
    (folder / "RECORD").write_text("thing.py,sha256=bb,1\n")
    assert not manifest.is_current(before)
