"""DeviceProfile: what a rank's device is, asked once. The only place that asks an accelerator anything."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# /proc/cpuinfo flag -> the name used here, weakest first: what a CPU kernel may want to know.
_INSTRUCTION_SETS = {
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512vl": "avx512vl",
    "avx512dq": "avx512dq",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_tile": "amx_tile",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "sve": "sve",
    "bf16": "arm_bf16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """One device, as a value: `query` makes it in the process that uses the device, others receive it."""

    kind: str  # "cuda" or "cpu"
    name: str
    total_memory: int  # bytes
    compute_capability: tuple[int, int] | None = None  # of an NVIDIA GPU
    gcn_architecture: str | None = None  # of an AMD GPU: "gfx942"
    num_multiprocessors: int | None = None  # of a GPU
    shared_memory_per_block_optin: int | None = None  # bytes, of a GPU
    l2_bytes: int | None = None  # of a GPU
    num_cores: int | None = None  # of a CPU: those that this process may run on
    instruction_sets: tuple[str, ...] = ()  # of a CPU

    @classmethod
    def query(cls, device: str = "cpu") -> DeviceProfile:
        """Ask `device` ("cpu", "cuda" or "cuda:N") what it is; for a GPU this initialises CUDA here.

        Raises ValueError for any other kind of device, and RuntimeError where the device is not there.
        """
        kind = device.partition(":")[0]
        if kind == "cpu":
            return _query_cpu()
        if kind == "cuda":
            return _query_cuda(device)
        raise ValueError(f"device is {device!r}; wanted 'cpu', 'cuda' or 'cuda:N'")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        memory = f"{self.total_memory / 2**30:.1f} GiB"
        if self.kind == "cpu":
            sets = " ".join(self.instruction_sets) or "no vector extensions known"
            return f"{self.name} ({self.num_cores} cores, {memory}, {sets})"
        return f"{self.name} ({self.architecture}, {self.num_multiprocessors} multiprocessors, {memory})"

    @property
    def architecture(self) -> str:
        """What compilers call it: "sm_90", "gfx942"; "cpu" for any CPU."""
        if self.gcn_architecture is not None:
            return self.gcn_architecture
        if self.compute_capability is not None:
            return "sm_{}{}".format(*self.compute_capability)
        return self.kind


def _query_cuda(device: str) -> DeviceProfile:
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"device is {device!r} but no GPU is visible to this process; use 'cpu', or a GPU build"
        )
    properties = torch.cuda.get_device_properties(torch.device(device))
    # A ROCm build of torch calls its devices "cuda", too, and their numbers are not compute capabilities.
    is_amd = torch.version.hip is not None
    return DeviceProfile(
        kind="cuda",
        name=properties.name,
        total_memory=properties.total_memory,
        compute_capability=None if is_amd else (properties.major, properties.minor),
        gcn_architecture=properties.gcnArchName.partition(":")[0] if is_amd else None,
        num_multiprocessors=properties.multi_processor_count,
        # Not in every build's properties (ROCm has no opt-in size).
        shared_memory_per_block_optin=getattr(
            properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
        ),
        l2_bytes=properties.L2_cache_size,
    )


def _query_cpu() -> DeviceProfile:
    name, flags = _cpuinfo(Path("/proc/cpuinfo"))
    if "amx_tile" in flags and not may_use_amx():
        flags = frozenset(flag for flag in flags if not flag.startswith("amx"))
    return DeviceProfile(
        kind="cpu",
        name=name or platform.processor() or platform.machine(),
        total_memory=_cpu_memory(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        instruction_sets=tuple(ours for flag, ours in _INSTRUCTION_SETS.items() if flag in flags),
    )


@functools.cache
def may_use_amx() -> bool:
    """Whether the system lets this process use AMX's tiles: Linux gives them to those that ask, on x86-64.

    The number of the call and its arguments are from the kernel's page "Using XSTATE features in user space".
    """
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    syscall = ctypes.CDLL(None).syscall
    return syscall(*map(ctypes.c_long, (arch_prctl, request_permission, tile_data))) == 0


def _cpuinfo(path: Path) -> tuple[str, frozenset[str]]:
    """Model name and feature flags of the first core; empty where the system has no such file."""
    name, flags = "", frozenset[str]()
    if not path.exists():
        return name, flags
    for line in path.read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        key = key.strip()
        if key == "model name" and not name:
            name = value.strip()
        elif key in ("flags", "Features") and not flags:
            flags = frozenset(value.split())
    return name, flags


def _cpu_memory() -> int:
    """Bytes of memory that this process can have: the machine's, or its control group's smaller limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit_file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(limit_file)
        text = path.read_text().strip() if path.exists() else ""
        if text.isdigit():
            total = min(total, int(text))
    return total
