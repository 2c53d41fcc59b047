"""A Triton driver that compiles for a GPU which need not be there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import triton
from triton.backends.compiler import GPUTarget


class CompileOnlyDriver:
    """What `JITFunction.warmup` asks a driver; anything that would run a kernel is missing."""

    def __init__(self, capability: tuple[int, int]) -> None:
        major, minor = capability
        self._target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return self._target

    def get_current_device(self) -> str:
        """Under what a kernel keeps what it compiled; real devices are numbers."""
        return f"compile-only sm_{self._target.arch}"

    def get_current_stream(self, device: str) -> int:
        """Never used: nothing is launched."""
        return 0


@contextmanager
def compile_only(capability: tuple[int, int]) -> Iterator[None]:
    """Within the block, `kernel.warmup` compiles for a GPU of this compute capability.

    The driver that was active before, if any, is active again afterwards. Not for several threads at once.
    """
    config = triton.runtime.driver
    before = config._active  # `config.active` would look for a GPU, and raise where there is none
    config.set_active(CompileOnlyDriver(capability))
    try:
        yield
    finally:
        config._active = before
