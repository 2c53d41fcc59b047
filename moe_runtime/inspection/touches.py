"""Touches: where an accelerator was touched, as a chain of modules from the model's own to the offending line."""

from __future__ import annotations

import linecache
import os
import sys
from dataclasses import dataclass
from types import FrameType

_HERE = os.path.dirname(os.path.abspath(__file__))
_REGISTRY = os.path.join(os.path.dirname(_HERE), "registry.py")

WAY_OUT = (
    "A model must import and build on machines without an accelerator. Move the call into the worker's __init__: "
    "the DeviceProfile and the KernelPlan made from it arrive there and say what the device can do."
)


@dataclass(frozen=True, slots=True)
class ChainLink:
    """One Python frame on the way to the touch."""

    module: str
    function: str | None  # None: module level
    file: str
    line: int
    source: str  # the line's text; "" where the file cannot be read

    def text(self) -> str:
        """`"mamba_mixer (/x/mamba_mixer.py:3): import expert_parallel"`."""
        inside = f", in {self.function}" if self.function else ""
        return f"{self.module}{inside} ({self.file}:{self.line}): {self.source}".rstrip(": ")


@dataclass(frozen=True, slots=True)
class Touch:
    """One forbidden call."""

    call: str  # "torch.cuda.get_device_properties"
    activity: str  # "importing", "describing" or "building"
    chain: tuple[ChainLink, ...]  # outermost first

    def summary(self) -> str:
        """One line: what was called, while doing what, and where."""
        where = f" at {self.chain[-1].file}:{self.chain[-1].line}" if self.chain else ""
        return f"{self.call} was called while {self.activity} the model{where}"

    def text(self) -> str:
        """The whole chain, a line for each link."""
        lines = [f"  {'  ' * depth}{link.text()}" for depth, link in enumerate(self.chain)]
        return "\n".join([f"{self.summary()}. Chain, outermost first:", *lines])


def is_harness(file: str) -> bool:
    """Whether a frame of this file belongs to the inspection or the import machinery, not to the model."""
    return file.startswith(("<frozen", "<string>", _HERE)) or file == _REGISTRY or _is_importlib(file)


def record_touch(call: str, activity: str, frame: FrameType | None, libraries: tuple[str, ...]) -> Touch:
    """Describe the touch made below `frame`.

    Frames of files under `libraries` (torch, Triton) are left out of the chain; the outermost of those next to
    the touch is the function that the model called, and names it better than the trap that it ended in.
    """
    links: list[ChainLink] = []
    while frame is not None:
        file = frame.f_code.co_filename
        module = frame.f_globals.get("__name__", "?")
        if file.startswith(libraries):
            if not links:
                call = f"{module}.{frame.f_code.co_qualname}"
        elif not is_harness(file):
            links.append(_link(frame, module, file))
        frame = frame.f_back
    return Touch(call, activity, tuple(reversed(links)))


def _link(frame: FrameType, module: str, file: str) -> ChainLink:
    name = frame.f_code.co_qualname
    source = linecache.getline(file, frame.f_lineno, frame.f_globals).strip()
    return ChainLink(module, None if name == "<module>" else name, file, frame.f_lineno, source)


def _is_importlib(file: str) -> bool:
    importlib_file = getattr(sys.modules.get("importlib"), "__file__", None)
    return importlib_file is not None and file.startswith(os.path.dirname(importlib_file) + os.sep)
