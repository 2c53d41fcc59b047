"""Running tests that make their tensors on the host with the Triton kernels on another device.

With `MOE_TEST_DEVICE=cuda` in the environment, `tests/kernels/conftest.py` installs this, and every Triton
implementation of an operation is given copies of its tensors on that device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from moe_kernels import implementations
from moe_kernels.sequences import PackedSequences


def install(device: str) -> None:
    """Have operations that are looked up as "triton" computed on `device`, in this process."""
    look_up = implementations._imported

    def moved(target: str, isa: str) -> Callable[..., Any]:
        found = look_up(target, isa)
        return on_device(found, device) if ".triton:" in target else found

    implementations._imported = moved


def on_device(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function` with its tensors copied to `device`, its results and all that it wrote to copied back."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        copies = _Copies(device)
        result = function(*copies.of(args), **{name: copies.of(value) for name, value in kwargs.items()})
        copies.take_back()
        return _to_host(result)

    return run


class _Copies:
    """Copies of whole storages, so that tensors that share one on the host share one on the device, as slices do."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # bytes there, bytes on the device

    def of(self, value: Any) -> Any:
        """`value` with its tensors on the device; size, strides and offset stay."""
        if isinstance(value, torch.Tensor):
            return self._of_tensor(value)
        if isinstance(value, tuple | list):
            return type(value)(self.of(item) for item in value)
        if isinstance(value, PackedSequences):
            tensors = {name: self.of(getattr(value, name)) for name in ("cu_seqlens", "context_lens_B")}
            return dataclasses.replace(value, **tensors)
        return value

    def take_back(self) -> None:
        """Write what the device's storages hold to the host's."""
        for host, copy in self._storages.values():
            host.copy_(copy)

    def _of_tensor(self, x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        key = storage.data_ptr()
        if key not in self._storages:
            host = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._storages[key] = host, host.to(self._device, copy=True)
        copy = self._storages[key][1].untyped_storage()
        empty = torch.empty(0, dtype=x.dtype, device=self._device)
        return empty.set_(copy, x.storage_offset(), x.shape, x.stride())


def _to_host(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.cpu()
    return type(result)(map(_to_host, result)) if isinstance(result, tuple | list) else result
