"""Reading safetensors headers: what is found, and what is said about broken files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_runtime.errors import CheckpointError
from moe_runtime.modelfiles import resolve_model
from moe_runtime.weights.index import index_files, read_header, read_index

BIG = torch.arange(12, dtype=torch.float32).reshape(3, 4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {"big": BIG, "half": torch.ones(5, dtype=torch.bfloat16), "none": torch.zeros(0, 3)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def _write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def test_header_gives_dtype_shape_and_place(file: Path) -> None:
    entries = read_header(file)
    assert set(entries) == {"big", "half", "none"}  # and not __metadata__
    assert (entries["big"].dtype, entries["big"].shape) == ("F32", (3, 4))
    assert (entries["half"].dtype, entries["half"].shape) == ("BF16", (5,))
    assert entries["none"].shape == (0, 3)
    raw = file.read_bytes()[entries["big"].start : entries["big"].end]
    assert raw == BIG.numpy().tobytes()


def test_index_of_several_files(tmp_path: Path, file: Path) -> None:
    save_file({"other": torch.zeros(2, dtype=torch.float16)}, tmp_path / "b.safetensors")
    index = index_files([file, tmp_path / "b.safetensors"])
    assert set(index) == {"big", "half", "none", "other"}
    assert index["other"].file.name == "b.safetensors"
    assert index.total_bytes == 48 + 10 + 0 + 4
    assert "absent" not in index


def test_truncated_data_names_bytes_wanted_and_seen(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    words = rf"model\.safetensors is truncated: .*at least {len(whole)} bytes and holds {len(whole) - 7}; download"
    with pytest.raises(CheckpointError, match=words):
        read_header(file)


@pytest.mark.parametrize("size", [0, 5, 8, 20])
def test_truncated_header(file: Path, size: int) -> None:
    whole = file.read_bytes()
    wanted = 8 if size < 8 else 8 + struct.unpack("<Q", whole[:8])[0]
    file.write_bytes(whole[:size])
    with pytest.raises(
        CheckpointError, match=f"truncated: it should hold at least {wanted} bytes and holds {size};"
    ):
        read_header(file)


def test_garbage(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x80\x04\x95 this is a pickle and no safetensors")
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors is no safetensors file: its first 8 bytes give a header"
    ):
        read_header(path)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer, not the weights; run `git lfs pull`"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{not json", "its header is not JSON"),
        (b"\xff\xfe\xfd", "its header is not JSON"),
        ([1, 2], "its header is not a JSON object"),
        ({"a": 3}, "its header describes a as 3"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "its header describes a as"),
        ({"a": {"dtype": 7, "shape": [1], "data_offsets": [0, 4]}}, "its header describes a as"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "its header describes a as"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, "its header describes a as"),
        (
            {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}},
            r"gives a 8 bytes, but F32 \[2, 2\] takes 16",
        ),
    ],
)
def test_broken_header(tmp_path: Path, header: object, words: str) -> None:
    path = _write(tmp_path / "x.safetensors", header, b"\0" * 64)
    with pytest.raises(CheckpointError, match=words):
        read_header(path)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be read: No such file"):
        read_header(tmp_path / "gone.safetensors")


def test_tensor_in_two_shards(tmp_path: Path, file: Path) -> None:
    save_file({"big": BIG}, tmp_path / "b.safetensors")
    with pytest.raises(
        CheckpointError, match=r"tensor big is in two files, .*model\.safetensors and .*b\.safetensors"
    ):
        index_files([file, tmp_path / "b.safetensors"])


def test_shard_without_the_tensors_that_the_index_promises(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    save_file({"a": BIG, "moved": BIG + 1}, tmp_path / "s1.safetensors")
    save_file({"b": BIG}, tmp_path / "s2.safetensors")
    weight_map = {"a": "s1.safetensors", "moved": "s1.safetensors", "b": "s2.safetensors"}
    index_file = tmp_path / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    assert set(read_index(resolve_model(tmp_path))) == {"a", "b", "moved"}

    weight_map |= {"moved": "s2.safetensors", "absent": "s1.safetensors"}
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    words = r"puts tensors into shards that do not hold them \(2\): moved in s2.safetensors, absent in s1.safetensors;"
    with pytest.raises(CheckpointError, match=words):
        read_index(resolve_model(tmp_path))
