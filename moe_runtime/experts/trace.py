"""RoutingTrace: which experts real tokens chose, in every MoE layer, and the file that it is kept in.

Shape legend: T tokens, K top-k.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_runtime.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTrace:
    """Choices in the order of the tokens, the same tokens in every layer."""

    num_experts: int
    layers: tuple[int, ...]  # index in the model of each MoE layer
    choices_TK: tuple[np.ndarray, ...]  # int16, logical expert ids, most probable first; one array a layer
    # First token of each piece of text that was computed by itself: it does not follow the token before it.
    starts: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.choices_TK[0])

    @property
    def top_k(self) -> int:
        return int(self.choices_TK[0].shape[1])

    def save(self, file: str | Path) -> None:
        """Write an `.npz` of `layer_0`, `layer_1`, ... (MoE layers alone are counted) and `num_experts`.

        `layers` and `starts` stand beside them, and a reader may do without.
        """
        arrays = {f"layer_{i}": choices for i, choices in enumerate(self.choices_TK)}
        with open(file, "wb") as opened:  # given a name, NumPy would append .npz to it
            np.savez_compressed(
                opened,
                num_experts=np.int64(self.num_experts),
                layers=np.array(self.layers, dtype=np.int64),
                starts=self.starts,
                **arrays,  # type: ignore[arg-type]
            )

    @classmethod
    def load(cls, file: str | Path) -> RoutingTrace:
        """Read what `save` wrote.

        Raises:
            ConfigError: the file cannot be read, or holds no trace.
        """
        try:
            with np.load(file) as arrays:
                found = {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
            reason = error if isinstance(error, OSError) else "it is no .npz file of numpy"
            raise ConfigError(
                f"{file} is no routing trace: {reason}; give one that `bench routing` wrote"
            ) from error
        missing = {"num_experts", "layer_0"} - found.keys()
        if missing:
            raise ConfigError(f"{file} is no routing trace: it has no array {', '.join(sorted(missing))}")
        num_layers = sum(name.startswith("layer_") for name in found)
        absent = [f"layer_{i}" for i in range(num_layers) if f"layer_{i}" not in found]
        if absent:
            raise ConfigError(f"{file} is no routing trace: it has {num_layers} layers, but no {absent[0]}")
        num_experts = int(found["num_experts"])
        choices = tuple(found[f"layer_{i}"] for i in range(num_layers))
        for index, chosen in enumerate(choices):
            _check_layer(f"{file}: layer_{index}", chosen, choices[0].shape, num_experts)
        return cls(
            num_experts=num_experts,
            layers=tuple(found.get("layers", np.arange(num_layers)).tolist()),
            choices_TK=tuple(chosen.astype(np.int16) for chosen in choices),
            starts=found.get("starts", np.zeros(1, dtype=np.int64)),
        )

    def check_fits(self, num_experts: int, num_layers: int, top_k: int) -> None:
        """Refuse a model whose routers could not have made these choices.

        Raises:
            ConfigError: its experts, MoE layers or choices a token are of another number.
        """
        seen = (self.num_experts, len(self.layers), self.top_k)
        wanted = (num_experts, num_layers, top_k)
        if seen != wanted:
            text = "{} experts in {} MoE layers, {} a token"
            raise ConfigError(
                f"the trace was recorded on {text.format(*seen)}; the model has {text.format(*wanted)}: record "
                "one with `bench routing MODEL --save-trace FILE`"
            )


def _check_layer(name: str, choices: np.ndarray, shape: tuple[int, ...], num_experts: int) -> None:
    if choices.ndim != 2 or choices.shape != shape or not choices.size:
        raise ConfigError(f"{name} must be [tokens, choices] as in every layer, got {list(choices.shape)}")
    if choices.dtype.kind != "i" or choices.min() < 0 or choices.max() >= num_experts:
        raise ConfigError(
            f"{name} must hold whole numbers from 0 to {num_experts - 1}, got {choices.dtype} from "
            f"{choices.min()} to {choices.max()}"
        )
