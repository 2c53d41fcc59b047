"""Fill a model's parameters from a checkpoint, reading only the slices that this rank needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from moe_models.interfaces import TensorLoad, WeightMap
from moe_runtime.errors import CheckpointError
from moe_runtime.weights.index import CheckpointIndex
from moe_runtime.weights.plan import LoadPlan, plan_load


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

    Parameters keep their device (not "meta") and dtype; what is read is converted where it differs.

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
    for file, reads in plan.reads.items():
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for read in reads:
                    num_bytes = _copy(tensors, read.load, parameters[read.load.target])
                    bytes_read += num_bytes
                    if on_progress is not None:
                        on_progress(num_bytes)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}; download or copy it again") from error
    return LoadReport(
        bytes_read=bytes_read,
        slices_read=sum(len(reads) for reads in plan.reads.values()),
        files_read=len(plan.reads),
        seconds=time.perf_counter() - began,
    )


def _copy(tensors: Any, load: TensorLoad, parameter: nn.Parameter) -> int:
    """Read one slice through the memory map, put it where it goes; the bytes that were read."""
    assert not parameter.is_meta, f"{load.target} is on the meta device; it has no memory to load into"
    source = tensors.get_slice(load.source)[load.source_index]
    num_bytes: int = source.nbytes
    if load.source_rows is not None:
        source = source[load.source_rows.to("cpu")]
    with torch.no_grad():
        parameter[load.target_index].copy_(source)
    return num_bytes
