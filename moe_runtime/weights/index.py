"""What tensors a checkpoint holds, and where: read from the safetensors headers alone."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.errors import CheckpointError
from moe_runtime.modelfiles import WEIGHTS_INDEX_FILE, ModelFiles

# Bytes an element. Types that are not here keep the size that the header gives them.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a checkpoint."""

    file: Path
    dtype: str  # safetensors' name: "BF16", "F32", ...
    shape: tuple[int, ...]
    start: int  # byte offset in the file of the first element
    end: int  # byte offset just past the last


class CheckpointIndex(Mapping[str, TensorEntry]):
    """Tensor name -> entry, for all files of a checkpoint."""

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(entry.end - entry.start for entry in self._entries.values())


def read_index(files: ModelFiles) -> CheckpointIndex:
    """Index a model's weight files.

    Raises CheckpointError where files are missing, truncated or broken, where two shards hold the same
    tensor, and where a shard lacks a tensor that the shard index says it holds.
    """
    index = index_files(files.weight_files())
    declared = files.shard_of_tensor() or {}
    misplaced = [
        f"{name} in {shard}"
        for name, shard in declared.items()
        if name not in index or index[name].file.name != shard
    ]
    if misplaced:
        more = f" and {len(misplaced) - 8} more" if len(misplaced) > 8 else ""
        raise CheckpointError(
            f"{files.path}: {WEIGHTS_INDEX_FILE} puts tensors into shards that do not hold them ({len(misplaced)}): "
            f"{', '.join(misplaced[:8])}{more}; the index and the shards are of different checkpoints"
        )
    return index


def index_files(paths: Iterable[Path]) -> CheckpointIndex:
    """Index safetensors files; no tensor may be in two of them."""
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        for name, entry in read_header(path).items():
            if name in entries:
                raise CheckpointError(
                    f"the tensor {name} is in two files, {entries[name].file} and {path}; keep one of them"
                )
            entries[name] = entry
    return CheckpointIndex(entries)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file: an 8-byte little-endian length, that many bytes of JSON, then the data.

    Raises CheckpointError for a file that is shorter than its header says, or whose header is garbage.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = _read_raw_header(file.read(_LENGTH_BYTES), file, path, size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is not a JSON object")
    data_start = _LENGTH_BYTES + len(raw)
    entries = {
        name: _entry(path, name, fields, data_start)
        for name, fields in header.items()
        if name != "__metadata__"
    }
    end = max((entry.end for entry in entries.values()), default=data_start)
    if end > size:
        raise _truncated(path, wanted=end, seen=size)
    return entries


def _read_raw_header(prefix: bytes, file: Any, path: Path, size: int) -> bytes:
    if len(prefix) < _LENGTH_BYTES:
        raise _truncated(path, wanted=_LENGTH_BYTES, seen=size)
    (length,) = struct.unpack("<Q", prefix)
    if length > _MAX_HEADER_BYTES:
        if (prefix + file.read(len(_LFS_POINTER))).startswith(_LFS_POINTER):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there")
        raise CheckpointError(
            f"{path} is no safetensors file: its first 8 bytes give a header of {length} bytes "
            f"(at most {_MAX_HEADER_BYTES} are allowed)"
        )
    if _LENGTH_BYTES + length > size:
        raise _truncated(path, wanted=_LENGTH_BYTES + length, seen=size)
    raw: bytes = file.read(length)
    return raw


def _entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape = fields["dtype"], tuple(fields["shape"])
        begin, end = fields["data_offsets"]
        numbers_ok = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (TypeError, KeyError, ValueError):
        numbers_ok = False
    if not numbers_ok or not isinstance(dtype, str):
        raise CheckpointError(f"{path} is no safetensors file: its header describes {name} as {fields!r}")
    wanted = math.prod(shape) * DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else end - begin
    if end - begin != wanted:
        raise CheckpointError(
            f"{path}: the header gives {name} {end - begin} bytes, but {dtype} {list(shape)} takes {wanted}"
        )
    return TensorEntry(file=path, dtype=dtype, shape=shape, start=data_start + begin, end=data_start + end)


def _truncated(path: Path, *, wanted: int, seen: int) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated: it should hold at least {wanted} bytes and holds {seen}; download or copy it again"
    )
