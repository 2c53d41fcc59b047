"""Finding a model: directories, config files, Hub ids, and what is said when there is none."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub

from moe_runtime.errors import CheckpointError, ConfigError, ModelNotFoundError
from moe_runtime.modelfiles import resolve_model

CONFIG = {"architectures": ["Qwen3NextForCausalLM"], "hidden_size": 8}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def _write_index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_directory_with_all_small_files(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"top_k": 20}')
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    files = resolve_model(directory)
    assert files.name == str(directory)
    assert files.path == directory
    assert files.config == CONFIG
    assert files.generation_config == {"top_k": 20}
    assert files.tokenizer_config == {"eos_token": "</s>"}
    assert pickle.loads(pickle.dumps(files)) == files  # it travels to the ranks


def test_small_files_may_be_missing(directory: Path) -> None:
    files = resolve_model(str(directory))
    assert files.generation_config == {}
    assert files.tokenizer_config is None


def test_relative_path_becomes_absolute(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory.parent)
    files = resolve_model(directory.name)
    assert files.name == directory.name
    assert files.path == directory


def test_none_is_the_demo_checkpoint() -> None:
    files = resolve_model(None)
    assert files.name == "demo"
    assert files.config["architectures"] == ["Qwen3NextForCausalLM"]
    assert [f.name for f in files.weight_files()] == ["model.safetensors"]


def test_config_file_alone_is_enough_to_inspect(directory: Path) -> None:
    renamed = directory / "some-model.json"
    (directory / "config.json").rename(renamed)
    files = resolve_model(renamed)
    assert files.config == CONFIG
    with pytest.raises(
        CheckpointError, match=r"no safetensors weights in .*; it holds some-model\.json; download"
    ):
        files.weight_files()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1,\n "b": }', r"config\.json, line 2, column 7: not valid JSON \(Expecting value\)"),
        ("", r"config\.json, line 1, column 1: not valid JSON"),
        ("[1]", r"config\.json holds a JSON array; it must hold an object"),
        ('"x"', r"holds a JSON string"),
        ("null", r"holds a JSON null"),
        ("{}", r"config\.json: the key 'architectures' is missing; it must be a list with the name"),
        ('{"architectures": []}', r"'architectures' is \[\]; it must be a list"),
        ('{"architectures": "Qwen"}', r"'architectures' is 'Qwen'; it must be a list"),
        ('{"architectures": null}', r"'architectures' is None; it must be a list"),
    ],
)
def test_unusable_config(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        resolve_model(tmp_path)


def test_config_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes('{"name": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json is not UTF-8 text \(byte 10"):
        resolve_model(tmp_path)


def test_broken_generation_config(directory: Path) -> None:
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json, line 1, column 2"):
        resolve_model(directory)


def test_directory_without_config_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "notes.md").touch()
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json.*it holds notes\.md, weights/$"):
        resolve_model(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"it holds nothing$"):
        resolve_model(tmp_path / "weights")


@pytest.mark.parametrize(
    "name", ["/no/such/directory", "./model", "../model", "a/b/c", "~/no-such-model", "a b"]
)
def test_no_such_directory_never_asks_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(ModelNotFoundError, match=f"no such directory: {name}"):
        resolve_model(name)


def test_empty_name() -> None:
    with pytest.raises(ModelNotFoundError, match="the model's name is empty"):
        resolve_model(" ")


def test_other_file(directory: Path) -> None:
    (directory / "model.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors is a file; give the model's directory"):
        resolve_model(directory / "model.safetensors")


# --------------------------------------------------------------------------- the Hub


def test_hub_id_downloads_a_snapshot(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def download(repo_id: str, **kwargs: Any) -> str:
        calls.append({"repo_id": repo_id, **kwargs})
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    files = resolve_model("owner/name", "v2")
    resolve_model("owner/name", config_only=True)
    assert (files.name, files.path) == ("owner/name", directory)
    assert (calls[0]["repo_id"], calls[0]["revision"]) == ("owner/name", "v2")
    assert "*.safetensors" in calls[0]["allow_patterns"]
    assert not any("safetensors" in pattern for pattern in calls[1]["allow_patterns"])


class _Response:
    headers: dict[str, str] = {}  # noqa: RUF012 -- the shape that huggingface_hub's errors read
    request = None
    status_code = 404


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub.GatedRepoError("x", response=_Response()), "only approved accounts read 'owner/name'"),  # type: ignore[arg-type]
        (
            hub.RepositoryNotFoundError("x", response=_Response()),
            "no such directory and no such model on the Hub",
        ),  # type: ignore[arg-type]
        (hub.RevisionNotFoundError("x", response=_Response()), "'owner/name' has no revision 'v2'"),  # type: ignore[arg-type]
        (hub.LocalEntryNotFoundError("x"), "no such directory: owner/name; .*the Hub cannot be reached"),
        (hub.OfflineModeIsEnabled("x"), "the Hub cannot be reached"),
        (hub.HFValidationError("x"), "no such directory: owner/name"),
        (OSError("disk full\nand more"), "downloading 'owner/name' at revision 'v2' .* failed: disk full$"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_hub_failures_are_one_clear_line(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo_id: str, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelNotFoundError, match=words) as caught:
        resolve_model("owner/name", "v2")
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- weight files


def test_single_file_wins_over_an_index(directory: Path) -> None:
    (directory / "model.safetensors").touch()
    _write_index(directory, {"a": "model-00001-of-00001.safetensors"})
    files = resolve_model(directory)
    assert files.weight_files() == [directory / "model.safetensors"]
    assert files.shard_of_tensor() is None


def test_shards_come_in_order(directory: Path) -> None:
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for shard in shards:
        (directory / shard).touch()
    _write_index(directory, {"z": shards[0], "a": shards[2], "m": shards[1], "b": shards[0]})
    assert [f.name for f in resolve_model(directory).weight_files()] == shards


def test_missing_shards_are_named(directory: Path) -> None:
    shards = [f"model-{i:05d}-of-00012.safetensors" for i in range(1, 13)]
    (directory / shards[0]).touch()
    _write_index(directory, dict(zip("abcdefghijkl", shards, strict=True)))
    words = r"lacks 11 of the 12 shards .*: model-00002-of-00012\.safetensors, .* and 3 more; download"
    with pytest.raises(CheckpointError, match=words):
        resolve_model(directory).weight_files()


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}])
def test_index_without_a_weight_map(directory: Path, weight_map: Any) -> None:
    _write_index(directory, weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json has no 'weight_map' object"):
        resolve_model(directory).weight_files()


def test_index_must_not_lead_outside(directory: Path) -> None:
    _write_index(directory, {"a": "../secret.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"names the shard '\.\./secret\.safetensors'; shards must lie in"
    ):
        resolve_model(directory).weight_files()


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (
            "pytorch_model.bin",
            r"it holds pytorch_model\.bin, which must be converted first: .*save_pretrained",
        ),
        ("adapter_model.safetensors", r"it holds adapter_model\.safetensors; add the index"),
        ("README.md", r"it holds README\.md, config\.json; download the weights"),
    ],
)
def test_no_weights_says_what_there_is(directory: Path, held: str, words: str) -> None:
    (directory / held).touch()
    with pytest.raises(CheckpointError, match=words):
        resolve_model(directory).weight_files()


def test_importing_loads_nothing_heavy() -> None:
    heavy = "torch", "transformers", "huggingface_hub", "ray"
    code = f"import sys, moe_runtime.modelfiles; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
