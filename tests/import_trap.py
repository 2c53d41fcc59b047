"""Run as a program: import the modules named on the command line and print, as JSON, who touched an accelerator.

The traps are simple on purpose and share nothing with the runtime's own AcceleratorGuard, which is itself among
the modules imported. Python finds the modules on its path: PYTHONPATH must name their folders.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

# The functions that ask a device, or make the libraries below them do so.
_TOUCHES = {
    "torch.cuda": """
        _lazy_init init get_device_properties get_device_name get_device_capability current_device set_device
        current_stream synchronize mem_get_info memory_allocated
    """,
    "torch.accelerator": "current_device_index set_device_index current_stream synchronize",
    "torch._C": "_cuda_init _cuda_getDevice _cuda_setDevice _cuda_getDeviceCount",
    "triton.runtime.driver": "_create_driver",
}
# Legitimate for a library to ask at import; our modules have no use for the answer there.
_QUESTIONS: dict[str, dict[str, Any]] = {
    "torch.cuda": {"is_available": False, "device_count": 0, "is_bf16_supported": False},
    "torch.accelerator": {"is_available": False, "device_count": 0, "current_accelerator": None},
}
_DRIVER_LIBRARY = re.compile(r"libcuda\.|libnvidia-ml\.|libamdhip64|libze_loader")
_DEVICE_FILES = ("/dev/nvidia", "/dev/kfd", "/dev/dri")


class Trap:
    """What was touched, by the module that was being imported then."""

    def __init__(self, own_folders: list[str]) -> None:
        self.current = ""  # module being imported
        self.found: dict[str, list[str]] = {}
        self._own = tuple(os.path.realpath(folder) + os.sep for folder in own_folders)

    def record(self, what: str) -> None:
        callers = traceback.extract_stack()[:-2]
        where = next((f for f in reversed(callers) if self._is_own(f.filename)), callers[-1])
        self.found.setdefault(self.current, []).append(f"{what} ({where.filename}:{where.lineno})")

    def install(self) -> None:
        for module_name, names in _TOUCHES.items():
            module = importlib.import_module(module_name)
            for name in names.split():
                if hasattr(module, name):  # a build without CUDA lacks the functions of torch._C
                    setattr(module, name, self._touch(f"{module_name}.{name}"))
        for module_name, answers in _QUESTIONS.items():
            module = importlib.import_module(module_name)
            for name, answer in answers.items():
                setattr(module, name, self._question(f"{module_name}.{name}", answer))
        sys.addaudithook(self._audit)

    def _is_own(self, file: str) -> bool:
        # The environment may lie inside our own tree.
        return os.path.realpath(file).startswith(self._own) and not file.startswith(sys.prefix + os.sep)

    def _touch(self, what: str) -> Callable[..., Any]:
        def touch(*args: object, **kwargs: object) -> None:
            self.record(what)
            raise RuntimeError(f"{what}: accelerators are forbidden here")

        return touch

    def _question(self, what: str, answer: Any) -> Callable[..., Any]:
        def question(*args: object, **kwargs: object) -> Any:
            if self._is_own(sys._getframe(1).f_code.co_filename):
                self.record(what)
            return answer

        return question

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "ctypes.dlopen" and _DRIVER_LIBRARY.search(str(args[0])):
            self.record(f"ctypes.CDLL({args[0]!r})")
        elif event == "open" and isinstance(args[0], str) and args[0].startswith(_DEVICE_FILES):
            self.record(f"open({args[0]!r})")


def main(modules: list[str]) -> None:
    """Import each module under the trap; a module that fails without a touch ends the program with its error."""
    trap = Trap(os.environ["PYTHONPATH"].split(os.pathsep))
    trap.install()
    for name in modules:
        trap.current = name
        try:
            importlib.import_module(name)
        except Exception:
            if name not in trap.found:
                raise
    print(json.dumps(trap.found))


if __name__ == "__main__":
    main(sys.argv[1:])
