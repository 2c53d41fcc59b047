"""Fill a model's parameters from a checkpoint, reading only the slices that this rank needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from moe_kernels.quant import dequantize
from moe_models.interfaces import WeightMap, scale_parameter
from moe_runtime.errors import CheckpointError
from moe_runtime.weights.index import CheckpointIndex
from moe_runtime.weights.plan import LoadPlan, PlannedRead, plan_load
from moe_runtime.weights.quantized import block_index, store_int8


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What loading did."""

    bytes_read: int  # bytes of the slices read, in the checkpoint's dtypes
    slices_read: int
    files_read: int
    seconds: float


def load_weights(
    model: nn.Module,
    weight_map: WeightMap,
    index: CheckpointIndex,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> LoadReport:
    """Check the checkpoint against the model, then fill every parameter in place.

    Parameters keep their device (not "meta") and dtype; what is read is converted where it differs, tensor by
    tensor. Parameters in int8 are quantised, their scales filled as well; float8 tensors are dequantised unless
    the parameter is float8 itself.

    Args:
        on_progress: called with the bytes of each slice once it has been copied; they add up to
            `plan_load(...).total_bytes`.

    Raises CheckpointError, before anything is read, listing tensors that are missing, left over, or of a
    wrong shape or dtype.
    """
    return load_planned(model, plan_load(model, weight_map, index), on_progress=on_progress)


def load_planned(
    model: nn.Module, plan: LoadPlan, *, on_progress: Callable[[int], None] | None = None
) -> LoadReport:
    """Carry out a plan made by `plan_load` for the same model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    began = time.perf_counter()
    bytes_read = 0
    scales: dict[str, torch.Tensor] = {}
    for file, names in plan.scale_files.items():
        with _opened(file) as tensors:
            scales.update((name, tensors.get_tensor(name)) for name in names)
    for file, reads in plan.reads.items():
        with _opened(file) as tensors:
            for read in reads:
                num_bytes = _copy(tensors, read, scales, parameters)
                bytes_read += num_bytes
                if on_progress is not None:
                    on_progress(num_bytes)
    return LoadReport(
        bytes_read=bytes_read,
        slices_read=sum(len(reads) for reads in plan.reads.values()),
        files_read=len(plan.reads),
        seconds=time.perf_counter() - began,
    )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The file's tensors; CheckpointError for whatever goes wrong while they are read."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; download or copy it again") from error


@torch.no_grad()
def _copy(
    tensors: Any,
    read: PlannedRead,
    scales: Mapping[str, torch.Tensor],
    parameters: Mapping[str, nn.Parameter],
) -> int:
    """Read one slice through the memory map, put it where it goes; the bytes that were read."""
    load, parameter = read.load, parameters[read.load.target]
    assert not parameter.is_meta, f"{load.target} is on the meta device; it has no memory to load into"
    source = tensors.get_slice(load.source)[load.source_index]
    num_bytes: int = source.nbytes
    if read.scale is not None:
        scale = scales[read.scale][load.source_index]
        num_bytes += scale.nbytes
        if parameter.dtype == torch.float8_e4m3fn:
            assert load.source_rows is None, f"{load.source} has its rows reordered, across blocks of scales"
            parameter[load.target_index].copy_(source)
            blocks = block_index(load.target_index, parameter.dim())
            parameters[scale_parameter(load.target)][blocks].copy_(scale)
            return num_bytes
        source = dequantize(source.to(parameter.device), scale.to(parameter.device).float(), torch.float32)
    if load.source_rows is not None:
        source = source[load.source_rows.to(source.device)]
    if parameter.dtype == torch.int8:
        scale = parameters[scale_parameter(load.target)]
        store_int8(parameter[load.target_index], scale[load.target_index], source)
    else:
        parameter[load.target_index].copy_(source)
    return num_bytes
