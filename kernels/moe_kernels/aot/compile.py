"""From a StaticLaunch to what its machine code uses: registers, memory, tensor cores, bytes in flight."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import PTXASError
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.aot.driver import compile_only
from moe_kernels.aot.occupancy import MULTIPROCESSORS, blocks_per_multiprocessor
from moe_kernels.static_launch import DescriptorArgument, StaticLaunch, TensorArgument

# What to look for in the PTX -> what it is called here; of several products the first is what matters.
MMA = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma.sync"}
COPIES = {"cp.async.bulk.tensor": "tma", "cp.async.c": "cp.async"}
_FLOAT8_MMA = re.compile(
    r"mma[^\n;]*(e4m3|f8f6f4)"
)  # the operands' type, or tcgen05's kind for all narrow ones
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_DESCRIBED_SIZE = 4096  # elements of each dimension of a tensor that a descriptor describes
_TYPICAL_INT = 1024  # of an argument whose value StaticLaunch leaves open


class KernelCompileError(Exception):
    """Triton or the assembler refused a launch; the message names it and says why, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernel:
    """One kernel's machine code for one architecture, in numbers."""

    capability: tuple[int, int]
    registers: int  # of a thread
    num_warps: int  # of a program, with those that warp specialisation adds
    shared_memory: int  # bytes of a program
    stack_bytes: int  # of a thread: above 0, registers were spilled or an array was indexed at run time
    local_bytes: int
    mma: str | None  # a value of MMA, the best of those used
    float8_mma: bool  # whether float8 is multiplied as it is
    copies: tuple[str, ...]  # values of COPIES
    blocks: int  # programs at once on a multiprocessor
    bytes_in_flight: int  # asked of memory at once by a multiprocessor's programs, on average; 0: not known

    @property
    def spilled_bytes(self) -> int:
        """Bytes of a thread that live in memory and not in registers."""
        return self.stack_bytes + self.local_bytes

    @property
    def fits(self) -> bool:
        """Whether the GPU can launch it: its shared memory is within what a block may opt in to."""
        return self.shared_memory <= MULTIPROCESSORS[self.capability].shared_memory_per_block

    @property
    def instructions(self) -> str:
        """What it multiplies and copies with: "wgmma e4m3, cp.async"."""
        mma = f"{self.mma} e4m3" if self.float8_mma else self.mma
        return ", ".join(filter(None, (mma, *self.copies))) or "-"


def compile_launch(launch: StaticLaunch, capability: tuple[int, int]) -> CompiledKernel:
    """Compile for a GPU that need not be there; the second time in a process costs nothing.

    Raises:
        KernelCompileError: it cannot be compiled.
        ValueError: the launch does not name the kernel's parameters, or Triton's interpreter is on.
    """
    try:
        code = _compiled(
            launch.kernel,
            tuple(launch.arguments.items()),
            tuple(launch.constants.items()),
            launch.num_warps,
            launch.num_stages,
            capability,
        )
    except (CompilationError, PTXASError, RuntimeError) as error:
        name = "{} {} for sm_{}{}".format(launch.name, launch.tile, *capability)
        raise KernelCompileError(f"{name} does not compile: {_last_line(error)}") from error
    blocks = blocks_per_multiprocessor(capability, code.registers, code.shared_memory, code.num_warps)
    return CompiledKernel(
        capability=capability,
        registers=code.registers,
        num_warps=code.num_warps,
        shared_memory=code.shared_memory,
        stack_bytes=code.stack_bytes,
        local_bytes=code.local_bytes,
        mma=next((name for text, name in MMA.items() if text in code.ptx), None),
        float8_mma=_FLOAT8_MMA.search(code.ptx) is not None,
        copies=tuple(name for text, name in COPIES.items() if text in code.ptx),
        blocks=blocks,
        bytes_in_flight=_bytes_in_flight(launch, blocks, capability),
    )


def _bytes_in_flight(launch: StaticLaunch, blocks: int, capability: tuple[int, int]) -> int:
    """Of a multiprocessor: no more programs than there are, and of each no more than its loop reads."""
    at_once = launch.bytes_at_once or launch.bytes_per_stage * (launch.num_stages - 1)
    if not launch.num_programs:
        return blocks * at_once
    programs = min(blocks, launch.num_programs / MULTIPROCESSORS[capability].count)
    return int(programs * min(at_once, launch.loop_bytes))


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Code:
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_memory: int
    num_warps: int
    ptx: str


@functools.cache
def _compiled(
    kernel: Any,
    arguments: tuple[tuple[str, Any], ...],
    constants: tuple[tuple[str, Any], ...],
    num_warps: int,
    num_stages: int,
    capability: tuple[int, int],
) -> _Code:
    if not isinstance(kernel, triton.JITFunction):
        raise ValueError(f"{kernel} cannot be compiled; was triton imported with TRITON_INTERPRET=1?")
    values = {name: _stand_in(argument) for name, argument in arguments} | dict(constants)
    _check_parameters(kernel, values)
    with compile_only(capability):
        binary = kernel.warmup(grid=(1,), num_warps=num_warps, num_stages=num_stages, **values)
    registers, stack, local = _resource_usage(binary.asm["cubin"])
    return _Code(
        registers=registers,
        stack_bytes=stack,
        local_bytes=local,
        shared_memory=binary.metadata.shared,
        num_warps=binary.metadata.num_warps,
        ptx=binary.asm["ptx"],
    )


def _stand_in(argument: Any) -> Any:
    """What is handed to Triton in place of a real argument."""
    if isinstance(argument, TensorArgument):
        return MockTensor(argument.dtype)
    if isinstance(argument, DescriptorArgument):
        shape = [_DESCRIBED_SIZE] * len(argument.block_shape)
        base = MockTensor(argument.dtype, shape)
        return TensorDescriptor(base, shape, list(base.stride()), list(argument.block_shape))
    if isinstance(argument, type):
        return argument(_TYPICAL_INT)
    return argument


def _check_parameters(kernel: triton.JITFunction, values: Mapping[str, Any]) -> None:
    wanted = set(kernel.arg_names)
    if wanted != set(values):
        missing, unknown = sorted(wanted - set(values)), sorted(set(values) - wanted)
        raise ValueError(f"{kernel.__name__} lacks arguments {missing} and has no parameters {unknown}")


def _resource_usage(cubin: bytes) -> tuple[int, int, int]:
    """(registers, stack bytes, local bytes) of a thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _USAGE.search(text)
    if found is None:
        raise RuntimeError(f"cuobjdump does not say what the kernel uses: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack, local
