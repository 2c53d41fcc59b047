"""AcceleratorGuard: catches every touch of an accelerator in this process, before it happens.

It detects the call rather than waits for it to fail, so a machine that has a GPU shows the same error as one
that has none. Asking whether there is an accelerator stays allowed, and is answered: there is none.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

from moe_runtime.inspection.touches import Touch, record_touch

_MAX_TOUCHES = 50  # a loop that swallows its touches must not fill the memory

_ANSWERS: dict[str, dict[str, Any]] = {
    "torch.cuda": {"is_available": False, "device_count": 0},
    "torch.xpu": {"is_available": False, "device_count": 0},
    "torch.mtia": {"is_available": False, "device_count": 0},
    "torch.mps": {"is_available": False, "device_count": 0},
    "torch.backends.mps": {"is_available": False},
    "torch.accelerator": {"is_available": False, "device_count": 0, "current_accelerator": None},
    "torch._C": {
        "_cuda_getDeviceCount": 0,
        "_xpu_getDeviceCount": 0,
        "_mtia_getDeviceCount": 0,
        "_mps_is_available": False,
    },
}

# Most calls end in _lazy_init. The others named here would answer from the driver, from NVML or from the C side
# without it, or give up for a reason of their own before they reach it.
_DEVICE_QUERIES = """
    _lazy_init init get_device_properties get_device_name get_device_capability current_device set_device
    synchronize current_stream default_stream set_stream can_device_access_peer get_rng_state set_rng_state
    mem_get_info memory_stats memory_allocated memory_reserved max_memory_allocated max_memory_reserved
    memory_summary memory_snapshot memory_usage device_memory_used utilization temperature power_draw clock_rate
    list_gpu_processes cudart current_blas_handle ipc_collect set_per_process_memory_fraction
    _exchange_device _maybe_exchange_device
"""
# Module to the names that are trapped in it, where this build of torch has them.
_TRAPS: dict[str, str] = {
    "torch.cuda": _DEVICE_QUERIES,
    "torch.xpu": _DEVICE_QUERIES,
    "torch.mtia": _DEVICE_QUERIES,
    "torch.mps": """
        synchronize current_allocated_memory driver_allocated_memory recommended_max_memory get_rng_state
        set_rng_state compile_shader load_metallib set_per_process_memory_fraction
    """,
    "torch.accelerator": """
        current_device_index current_device_idx set_device_index set_device_idx current_stream set_stream
        synchronize get_device_capability get_memory_info memory_stats memory_allocated memory_reserved
        max_memory_allocated max_memory_reserved
    """,
    "torch._C": """
        _cuda_init _cuda_getDevice _cuda_setDevice _cuda_exchangeDevice _cuda_maybeExchangeDevice
        _cuda_synchronize _cuda_getCurrentStream _cuda_getCurrentRawStream _cuda_getDefaultStream
        _cuda_setStream _cuda_memoryStats _cuda_memorySnapshot _cuda_canDeviceAccessPeer
        _cuda_getCurrentBlasHandle
        _xpu_init _xpu_getDevice _xpu_setDevice _xpu_exchangeDevice _xpu_maybeExchangeDevice _xpu_synchronize
        _xpu_getCurrentStream _xpu_setStream
        _mtia_init _mtia_getDevice _mtia_setDevice _mtia_exchangeDevice _mtia_deviceSynchronize
        _mtia_getDeviceProperties _mtia_getDeviceCapability _mtia_getCurrentStream _mtia_memoryStats
        _mps_deviceSynchronize _mps_currentAllocatedMemory _mps_driverAllocatedMemory
        _mps_recommendedMaxMemory
        _accelerator_getDeviceIndex _accelerator_setDeviceIndex _accelerator_exchangeDevice
        _accelerator_maybeExchangeDevice _accelerator_getStream _accelerator_setStream
        _accelerator_synchronizeDevice _accelerator_getDeviceCapability _accelerator_getDeviceStats
        _accelerator_getMemoryInfo
    """,
}

_DRIVER_LIBRARY = re.compile(
    r"(libcuda\.|libnvidia-ml\.|nvcuda|nvml\.dll|libamdhip64|libhsa-runtime64|librocm_smi64|libamd_smi"
    r"|libze_loader|libze_intel_gpu)"
)
_DEVICE_FILES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/")
_QUERY_TOOLS = re.compile(r"(^|[/\s])(nvidia-smi|rocm-smi|rocminfo|amd-smi|xpu-smi)(\s|$)")


class ForbiddenTouchError(RuntimeError):
    """Raised at the touch. A RuntimeError, since that is what torch raises where there is no GPU."""


class AcceleratorGuard:
    """Traps in this process, from `install` to its end. There is no way to take them out again."""

    def __init__(self) -> None:
        self.touches: list[Touch] = []
        self.activity = "importing"  # what the inspection is doing now
        self._libraries: tuple[str, ...] = ()

    def install(self) -> None:
        """Import torch, then lay the traps; torch's own import may load driver libraries as it likes."""
        import torch
        import torch.accelerator
        import torch.backends.mps
        import torch.mps
        import torch.mtia
        import torch.xpu

        self._libraries = (os.path.dirname(torch.__file__) + os.sep,)
        replaced: dict[int, Any] = {}
        for module_name, names in _TRAPS.items():
            traps = {name: self._trap(f"{module_name}.{name}") for name in names.split()}
            self._replace(module_name, traps, replaced)
        for module_name, answers in _ANSWERS.items():
            self._replace(module_name, {n: _answer(v) for n, v in answers.items()}, replaced)
        _replace_copies(replaced)
        # Making a stream asks the driver for the current device, from the C side.
        torch.cuda.Stream.__new__ = self._trap("torch.cuda.Stream")  # type: ignore[method-assign]
        torch.xpu.Stream.__new__ = self._trap("torch.xpu.Stream")  # type: ignore[method-assign]
        if driver := sys.modules.get("triton.runtime.driver"):
            self._trap_triton(driver)
        else:
            sys.meta_path.insert(0, _AfterImport("triton.runtime.driver", self._trap_triton))
        sys.addaudithook(self._audit)

    def touched(self, call: str) -> NoReturn:
        """Record the stack, then refuse the call."""
        touch = record_touch(call, self.activity, sys._getframe(1), self._libraries)
        if len(self.touches) < _MAX_TOUCHES:
            self.touches.append(touch)
        raise ForbiddenTouchError(
            f"{touch.call} was called while {self.activity} the model; no accelerator may be touched there"
        )

    def _trap(self, call: str) -> Callable[..., NoReturn]:
        def trap(*args: object, **kwargs: object) -> NoReturn:
            self.touched(call)

        return trap

    @staticmethod
    def _replace(module_name: str, by_name: dict[str, Any], replaced: dict[int, Any]) -> None:
        module = sys.modules[module_name]
        for name, replacement in by_name.items():
            original = getattr(module, name, None)
            if original is not None:
                replaced[id(original)] = (original, replacement)
                setattr(module, name, replacement)

    def _trap_triton(self, driver: ModuleType) -> None:
        """A driver that someone set by hand stays usable; finding one on this machine is the touch."""
        self._libraries += (os.path.dirname(os.path.dirname(driver.__file__ or "")) + os.sep,)
        driver._create_driver = self._trap("triton.runtime.driver.active")  # type: ignore[attr-defined]

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        # Runs for every audited event of the process: the comparisons come first.
        if event == "open":
            if isinstance(args[0], str) and args[0].startswith(_DEVICE_FILES):
                self.touched(f"open({args[0]!r})")
        elif event == "ctypes.dlopen":
            name = os.path.basename(_text(args[0]))
            if _DRIVER_LIBRARY.match(name):
                self.touched(f"ctypes.CDLL({name!r})")
        elif event in ("subprocess.Popen", "os.system"):
            command = args[1] if event == "subprocess.Popen" else args[0]
            parts = command if isinstance(command, list | tuple) else [command]
            found = _QUERY_TOOLS.search(_text(parts[0])) if parts else None
            if found:
                self.touched(found.group(2))


def _answer(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _replace_copies(replaced: dict[int, Any]) -> None:
    """Also where another torch module has taken the function with `from ... import`."""
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("torch.") or not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)][1])


def _text(value: object) -> str:
    if isinstance(value, bytes | os.PathLike):
        return os.fsdecode(value)
    return value if isinstance(value, str) else ""


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `action(module)` once the named module has been executed."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._action(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
