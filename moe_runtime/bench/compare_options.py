"""What `bench compare` is asked for: what every system computes, and which engines to compare with."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from moe_runtime.bench.turns import Shape
from moe_runtime.errors import ConfigError


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareWorkload:
    """What every system computes."""

    concurrency: tuple[int, ...] = (1, 8, 32)  # requests at once, of the decode workloads; () for none
    input_len: int = 128  # tokens of each of their prompts
    output_len: int = 128  # tokens generated for each
    prefill_len: tuple[int, ...] = (
        512,
        2048,
    )  # tokens of one prompt after which one is generated; () for none
    num_rounds: int = 3
    threads: int = field(default_factory=usable_cores)  # of each system, all its processes together
    seed: int = 0  # of the prompts

    def __post_init__(self) -> None:
        for name in ("concurrency", "prefill_len"):
            values = getattr(self, name)
            if any(value < 1 for value in values):
                raise ConfigError(f"{name} must be whole numbers of at least 1, got {list(values)}")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} has a number twice: {list(values)}")
        for name in ("input_len", "output_len", "num_rounds", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.shapes:
            raise ConfigError("nothing to measure: give numbers to concurrency or prefill_len")

    @property
    def max_len(self) -> int:
        """Tokens of a prompt and its output together, at most."""
        return max(shape.input_len + shape.output_len for shape in self.shapes)

    @property
    def shapes(self) -> list[Shape]:
        """The workloads, in the order they are measured."""
        decode = [
            Shape(kind="decode", num_requests=n, input_len=self.input_len, output_len=self.output_len)
            for n in self.concurrency
        ]
        prefill = [Shape(kind="prefill", num_requests=1, input_len=n, output_len=1) for n in self.prefill_len]
        return decode + prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions:
    """Which engines to compare with, and how they are run."""

    peers: tuple[str, ...] | None = None  # "KIND" or "KIND:VARIANT"; None: all that are installed
    pythons: tuple[str, ...] = ()  # "KIND=PATH"
    converter: str | None = None  # llama.cpp's convert_hf_to_gguf.py
    gguf_cache: str | None = None  # directory for its results; None: one that ends with the run
    tune: bool = True  # let peers try settings in each warm-up
    timeout_s: float = 1800.0  # that a peer's answer may take

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise ConfigError(f"peer_timeout_s must be above 0, got {self.timeout_s:g}")
        if self.converter is not None and not Path(self.converter).is_file():
            raise ConfigError(f"--llama-cpp-converter {self.converter}: there is no such file")
        if self.gguf_cache is not None and not Path(self.gguf_cache).absolute().parent.is_dir():
            raise ConfigError(f"--gguf-cache {self.gguf_cache}: give a directory in one that exists")
