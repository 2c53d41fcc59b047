"""Fake CUDA tensors in a build of torch that knows no CUDA.

Such a build runs operators on fake CUDA tensors, but indexing, `Tensor.to` and others enter the device's guard first,
and there is none. FakeTensorMode gives a build with CUDA and no GPU a guard that does nothing; here the one of the
"meta" device, which does nothing either, is registered for CUDA.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry, an array
_CUDA, _META = 1, 14  # c10::DeviceType


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Within the block, tensors are fake, on whichever device, and nothing can be read back from them."""
    with _cuda_guard(), FakeTensorMode(), torch.no_grad():
        yield


@contextmanager
def _cuda_guard() -> Iterator[None]:
    if torch.backends.cuda.is_built():
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, _REGISTRY)
    assert guards[_CUDA] is None
    assert guards[_META] is not None
    guards[_CUDA] = guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = None
