"""Check a checkpoint against a model, and plan which slices of which files this rank reads."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moe_models.interfaces import TensorLoad, WeightMap, scale_parameters
from moe_runtime.errors import CheckpointError
from moe_runtime.weights.index import DTYPE_BYTES, CheckpointIndex, TensorEntry
from moe_runtime.weights.quantized import (
    FLOAT8,
    Index,
    scale_faults,
    scale_index,
    scale_name,
)

ACCEPTED_DTYPES = ("F32", "F16", "BF16")
_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Extent:
    """The part [start, stop) of one dimension; `kept` is False where an integer index drops the dimension."""

    start: int
    stop: int
    kept: bool

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRead:
    """One slice to read and where it goes."""

    load: TensorLoad
    offset: int  # byte offset in the file of the slice's first element
    num_bytes: int  # of the slice and of its scales
    scale: str | None  # tensor with the scales of a float8 source


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What one rank reads, in the order in which it should."""

    reads: Mapping[Path, tuple[PlannedRead, ...]]  # by file, in the order of offsets
    total_bytes: int
    scale_files: Mapping[Path, tuple[str, ...]]  # tensors with scales, by file, wherever their weights lie


def plan_load(model: nn.Module, weight_map: WeightMap, index: CheckpointIndex) -> LoadPlan:
    """Check everything that can be checked without reading a tensor, then order the reads.

    Raises one CheckpointError for tensors that are missing, left over, or of a wrong shape or dtype. That
    the weight map fills every parameter exactly once is the model's promise, and asserted.
    """
    check_tensors(weight_map, index, type(model).__name__)
    check_coverage(model, weight_map, index)
    check_float8(model, weight_map, index)
    by_file: dict[Path, list[PlannedRead]] = defaultdict(list)
    for load in weight_map.loads:
        by_file[index[load.source].file].append(_planned_read(load, index))
    reads = {file: tuple(sorted(by_file[file], key=lambda read: read.offset)) for file in sorted(by_file)}
    return LoadPlan(
        reads=reads,
        total_bytes=sum(r.num_bytes for file in reads.values() for r in file),
        scale_files=_scale_files(reads, index),
    )


def check_tensors(weight_map: WeightMap, index: CheckpointIndex, model_name: str) -> None:
    """Raise one CheckpointError that lists every way in which the checkpoint is not the model's."""
    expected = weight_map.expected
    ignored = [re.compile(pattern) for pattern in weight_map.ignored]
    present = [name for name in expected if name in index]
    scales = {scale_name(name) for name in present if index[name].dtype == FLOAT8}
    problems = {
        "missing": [name for name in expected if name not in index],
        "left over": [
            name
            for name in index
            if name not in expected and name not in scales and not any(p.fullmatch(name) for p in ignored)
        ],
        "of the wrong shape": [
            f"{name} is {list(index[name].shape)}, wanted {list(expected[name])}"
            for name in present
            if index[name].shape != tuple(expected[name])
        ],
        "of the wrong dtype": [
            f"{name} is {index[name].dtype}, wanted one of {', '.join(ACCEPTED_DTYPES)}"
            for name in present
            if index[name].dtype not in ACCEPTED_DTYPES and index[name].dtype != FLOAT8
        ],
        "without usable scales": scale_faults(index, present),
    }
    parts = [f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names]
    if parts:
        raise CheckpointError(
            f"the checkpoint's tensors are not those of {model_name}: {'; '.join(parts)}; "
            f"check that config.json and the weights are of the same model"
        )


def check_coverage(model: nn.Module, weight_map: WeightMap, index: CheckpointIndex) -> None:
    """Assert that the loads fit their targets and fill each parameter completely and once."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    boxes: dict[int, list[tuple[Extent, ...]]] = defaultdict(list)
    for load in weight_map.loads:
        assert load.target in parameters, f"{load.target} is no parameter of {type(model).__name__}"
        assert load.source in weight_map.expected, (
            f"{load.source} is loaded but not among the expected tensors"
        )
        parameter = parameters[load.target]
        box = extents(load.target_index, tuple(parameter.shape))
        wanted = kept_shape(box)
        read = kept_shape(extents(load.source_index, index[load.source].shape))
        if load.source_rows is not None:
            read = (load.source_rows.numel(), *read[1:])
        assert read == wanted, f"{load.source} gives {read} where {load.target} takes {wanted}"
        boxes[id(parameter)].append(box)
    # Scales are filled with their weights.
    for name in set(parameters) - scale_parameters(model):
        parameter = parameters[name]
        fault = _tiling_fault(boxes[id(parameter)], tuple(parameter.shape))
        assert fault is None, f"the weight map {fault} of the parameter {name}"


def check_float8(model: nn.Module, weight_map: WeightMap, index: CheckpointIndex) -> None:
    """Raise CheckpointError where a parameter is kept in float8 and the checkpoint's tensor is not."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    plain = [
        load.source
        for load in weight_map.loads
        if parameters[load.target].dtype == torch.float8_e4m3fn and index[load.source].dtype != FLOAT8
    ]
    if plain:
        raise CheckpointError(
            f"config.json says that the experts are fp8, and {len(plain)} of their tensors are not ({_some(plain)}); "
            f"experts that are partly fp8 are supported on CPUs alone (device='cpu')"
        )


def extents(index: Index, shape: tuple[int, ...]) -> tuple[Extent, ...]:
    """`index` applied to `shape`, one extent a dimension. Steps and negative integers are not supported."""
    assert len(index) <= len(shape), f"index {index} has more dimensions than {shape}"
    found = []
    for item, size in zip((*index, *(slice(None),) * (len(shape) - len(index))), shape, strict=True):
        if isinstance(item, slice):
            start, stop, step = item.indices(size)
            asked = item.stop if item.stop is not None else size
            assert step == 1, f"slice {item} has a step"
            assert start <= stop, f"slice {item} of a dimension of {size} runs backwards"
            assert asked <= size, f"slice {item} goes past the end of a dimension of {size}"
            found.append(Extent(start, stop, True))
        else:
            assert 0 <= item < size, f"index {item} of a dimension of {size}"
            found.append(Extent(item, item + 1, False))
    return tuple(found)


def kept_shape(box: tuple[Extent, ...]) -> tuple[int, ...]:
    """The shape that indexing gives: integer-indexed dimensions are gone."""
    return tuple(extent.size for extent in box if extent.kept)


def _planned_read(load: TensorLoad, index: CheckpointIndex) -> PlannedRead:
    entry, scale, scale_bytes = index[load.source], None, 0
    if entry.dtype == FLOAT8:
        scale = scale_name(load.source)
        scale_bytes = _slice_place(scale_index(load.source_index, entry), index[scale])[1]
    offset, num_bytes = _slice_place(load.source_index, entry)
    return PlannedRead(load=load, offset=offset, num_bytes=num_bytes + scale_bytes, scale=scale)


def _scale_files(
    reads: Mapping[Path, tuple[PlannedRead, ...]], index: CheckpointIndex
) -> dict[Path, tuple[str, ...]]:
    names = {read.scale: None for file in reads.values() for read in file if read.scale is not None}
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        by_file[index[name].file].append(name)
    return {file: tuple(found) for file, found in by_file.items()}


def _slice_place(index: Index, entry: TensorEntry) -> tuple[int, int]:
    """(byte offset in the file of the slice's first element, bytes of the slice)."""
    itemsize = DTYPE_BYTES[entry.dtype]
    offset, stride, elements = 0, 1, 1
    for extent, size in reversed(list(zip(extents(index, entry.shape), entry.shape, strict=True))):
        offset += extent.start * stride
        stride *= size
        elements *= extent.size
    return entry.start + offset * itemsize, elements * itemsize


def _tiling_fault(boxes: list[tuple[Extent, ...]], shape: tuple[int, ...]) -> str | None:
    """Whether the boxes cover `shape` exactly once, on a grid whose lines are the boxes' own edges.

    The grid has a cell for each distinguishable part, not for each element, so that a parameter of a
    billion elements filled from a thousand tensors is checked on a thousand cells.
    """
    edges = [
        sorted({0, size, *(edge for box in boxes for edge in (box[dim].start, box[dim].stop))})
        for dim, size in enumerate(shape)
    ]
    place = [{edge: i for i, edge in enumerate(line)} for line in edges]
    writes = torch.zeros([len(line) - 1 for line in edges], dtype=torch.int32, device="cpu")
    for box in boxes:
        cell = tuple(slice(place[dim][e.start], place[dim][e.stop]) for dim, e in enumerate(box))
        writes[cell] += 1
    if bool((writes == 0).any()):
        return "leaves a part unfilled"
    return "fills a part twice" if bool((writes > 1).any()) else None


def _some(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _NAMES_SHOWN} more" if len(every) > _NAMES_SHOWN else ""
    return ", ".join(every[:_NAMES_SHOWN]) + more
