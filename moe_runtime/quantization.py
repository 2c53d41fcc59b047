"""Which weights a deployment keeps in fewer bits: from the `quantization` option and the checkpoint itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

METHODS = ("int8", "fp8")
_BLOCK = 128  # rows and columns that share a scale in an FP8 checkpoint
# What `quantization_config` must say where it says it: the format of the official FP8 checkpoints.
_FP8_FORMAT: Mapping[str, object] = {
    "quant_method": "fp8",
    "weight_block_size": [_BLOCK, _BLOCK],
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "scale_fmt": "float",
    "expert_dtype": "fp8",
}
_REQUIRED = ("quant_method", "weight_block_size")


@dataclass(frozen=True, slots=True)
class WeightFormats:
    """What a rank keeps its weights in, as names of torch dtypes; None is the model's dtype."""

    linear: str | None = None  # linear layers of decoder layers and the LM head, routers and gates excepted
    experts: str | None = None

    def dtypes(self) -> dict[str, torch.dtype | None]:
        """The same as dtypes: arguments of `KernelPlan.with_weights`."""
        import torch  # here, as drivers read this module without torch

        named = {"linear": self.linear, "experts": self.experts}
        return {part: None if name is None else getattr(torch, name) for part, name in named.items()}


def check_method(method: str | None) -> None:
    """Raise ConfigError unless `method` is a value of the `quantization` option."""
    if method is not None and method not in METHODS:
        raise ConfigError(
            f"quantization must be one of {', '.join(METHODS)}, got {method!r}{did_you_mean(str(method), METHODS)}; "
            f"leave it out to keep the checkpoint's own weights"
        )


def find_quantization(config: Mapping[str, Any], asked: str | None = None) -> str | None:
    """What was asked for, else what the checkpoint's config.json says: "int8", "fp8" or None.

    Raises:
        ConfigError: the checkpoint is quantised in another way than FP8 in blocks of 128 x 128, or "fp8" was
            asked for and it is not.
    """
    check_method(asked)
    section = config.get("quantization_config")
    if section:
        _check_stored(section)
    elif asked == "fp8":
        raise ConfigError(
            "quantization='fp8' needs an FP8 checkpoint, and config.json has no quantization_config; use the "
            "model's FP8 checkpoint, or quantization='int8' on CPUs"
        )
    return asked or ("fp8" if section else None)


def check_device(quantization: str | None, device: str) -> None:
    """Raise ConfigError where ranks on `device` ("cpu" or "cuda") cannot compute with such weights."""
    if quantization == "int8" and device != "cpu":
        raise ConfigError(
            f"quantization='int8' is for CPU ranks, and these would run on {device}; use device='cpu', or leave "
            f"quantization out (an FP8 checkpoint halves the experts on GPUs)"
        )


def kept_quantization(quantization: str | None, device: str) -> str | None:
    """What is left of it in memory: float8 stays on GPUs alone, a CPU has no arithmetic for it."""
    return None if quantization == "fp8" and device == "cpu" else quantization


def weight_formats(kept: str | None, moe_intermediate_size: int) -> WeightFormats:
    """The dtypes that go with a result of `kept_quantization`.

    Gate and up lie in one parameter, so float8 experts whose gate ends inside a block are dequantised.
    """
    if kept == "int8":
        return WeightFormats(linear="int8", experts="int8")
    if kept == "fp8" and moe_intermediate_size % _BLOCK == 0:
        return WeightFormats(experts="float8_e4m3fn")
    return WeightFormats()


def _check_stored(section: object) -> None:
    if not isinstance(section, Mapping):
        raise _unsupported("quantization_config", section)
    for key, wanted in _FP8_FORMAT.items():
        if key in section or key in _REQUIRED:
            seen = section.get(key)
            if (list(seen) if isinstance(seen, tuple) else seen) != wanted:
                raise _unsupported(f"quantization_config.{key}", seen)


def _unsupported(key: str, seen: object) -> ConfigError:
    return ConfigError(
        f"config.json: {key} is {seen!r}; supported are unquantised checkpoints and quant_method 'fp8' (e4m3, "
        f"dynamic activations, float scales) with weight_block_size [{_BLOCK}, {_BLOCK}]; use such a checkpoint of "
        f"the model, with quantization='int8' for int8 weights on CPUs"
    )
