"""What must hold for every kernel's machine code."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from moe_kernels.aot.compile import CompiledKernel, KernelCompileError, compile_launch
from moe_kernels.aot.occupancy import MULTIPROCESSORS
from moe_kernels.static_launch import DescriptorArgument, StaticLaunch

# Less than this does not keep a multiprocessor's share of the memory's latency times bandwidth busy.
DECODE_BYTES_IN_FLIGHT = 32 * 1024
_MMA = {(8, 0): "mma.sync", (8, 9): "mma.sync", (9, 0): "wgmma", (10, 0): "tcgen05", (12, 0): "mma.sync"}


def expected_mma(launch: StaticLaunch, capability: tuple[int, int]) -> str:
    """The tensor-core instruction that this launch should multiply with."""
    return "mma.sync" if launch.small_mma else _MMA[capability]


def expected_copy(launch: StaticLaunch) -> str | None:
    """The instruction that should fill the stages of this launch's loop; None for one that has none."""
    if any(isinstance(argument, DescriptorArgument) for argument in launch.arguments.values()):
        return "tma"
    return "cp.async" if launch.bytes_per_stage and launch.num_stages > 1 else None


def faults_of(launches: Iterable[StaticLaunch], capability: tuple[int, int]) -> list[str]:
    """One line for each thing that is wrong with any of them."""
    faults = []
    for launch in launches:
        try:
            code = compile_launch(launch, capability)
        except KernelCompileError as error:
            faults.append(str(error))
        else:
            faults += [f"{launch.name} {launch.tile}: {fault}" for fault in find_faults(launch, code)]
    return faults


def find_faults(launch: StaticLaunch, code: CompiledKernel) -> list[str]:
    """One line for each thing that is wrong; [] for a good kernel."""
    faults = []
    if code.spilled_bytes:
        faults.append(f"spills {code.spilled_bytes} bytes a thread")
    if not code.fits:
        faults.append(f"wants {code.shared_memory} bytes of shared memory, more than a block may have")
    if code.blocks == 0:
        faults.append(f"does not fit on a multiprocessor: {code.registers} registers, {code.num_warps} warps")
    if launch.persistent_programs > code.blocks:
        faults.append(
            f"asks for {launch.persistent_programs} programs at once, of which {code.blocks} can be"
        )
    wanted = expected_mma(launch, code.capability)
    if launch.mma and code.mma != wanted:
        faults.append(f"multiplies with {code.mma}, wanted {wanted}")
    if launch.mma and _multiplies_float8(launch) and not code.float8_mma:
        faults.append("multiplies float8 as something wider")
    copy = expected_copy(launch)
    if copy and copy not in code.copies:
        faults.append(f"brings weights with {' and '.join(code.copies) or 'plain loads'}, wanted {copy}")
    is_decode = "decode" in launch.name or "tiny" in launch.name
    wanted_bytes = _wanted_bytes(launch, code.capability)
    if is_decode and code.bytes_in_flight < wanted_bytes:
        faults.append(f"has {code.bytes_in_flight} bytes in flight, wanted {wanted_bytes}")
    return faults


def _wanted_bytes(launch: StaticLaunch, capability: tuple[int, int]) -> int:
    """What should be in flight, or all that there is to read where that is less."""
    if not launch.num_programs:
        return DECODE_BYTES_IN_FLIGHT
    share = launch.num_programs * launch.loop_bytes // MULTIPROCESSORS[capability].count
    return min(DECODE_BYTES_IN_FLIGHT, share)


def _multiplies_float8(launch: StaticLaunch) -> bool:
    """Both operands are float8: two arguments, as nothing else of a kernel is."""
    dtypes = [getattr(argument, "dtype", None) for argument in launch.arguments.values()]
    return dtypes.count(torch.float8_e4m3fn) >= 2
