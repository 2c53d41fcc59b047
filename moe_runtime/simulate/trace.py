"""Traces of routing: what a model really chose, in a file that `simulate --routing FILE` replays.

The format is NumPy's `.npz`, which `bench routing` writes:

    num_experts   an integer: logical experts of a MoE layer
    layer_0, ...  one array for each MoE layer in order, int16 [tokens, top_k]: the logical experts of each token,
                  tokens in the order in which they were computed; all layers have the same shape
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from moe_runtime.errors import ConfigError
from moe_runtime.simulate.routing import ReplayedRouting


def read_trace(path: str) -> ReplayedRouting:
    """Load and check a trace.

    Raises:
        ConfigError: there is no such file, or it is not as described above.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--routing must be uniform, zipf:SKEW or the path of a trace (.npz), got {path!r}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise ConfigError(f"{path} is no .npz file of NumPy: {error}") from error
    if "num_experts" not in arrays or "layer_0" not in arrays:
        raise ConfigError(
            f"{path} must hold num_experts and layer_0, layer_1, ...; it holds {sorted(arrays)}"
        )
    num_experts = int(arrays["num_experts"])
    layers: list[np.ndarray] = []
    while (name := f"layer_{len(layers)}") in arrays:
        layers.append(_checked(arrays[name], f"{path}, {name}", num_experts, arrays["layer_0"].shape))
    return ReplayedRouting(Path(path).name, num_experts, tuple(layers))


def write_trace(path: str | Path, num_experts: int, layers: list[np.ndarray]) -> None:
    """Save choices, a layer [tokens, top_k] each, in the format above."""
    arrays = {f"layer_{i}": layer.astype(np.int16) for i, layer in enumerate(layers)}
    np.savez_compressed(path, allow_pickle=False, num_experts=np.array(num_experts), **arrays)


def _checked(layer: np.ndarray, what: str, num_experts: int, shape: tuple[int, ...]) -> np.ndarray:
    if layer.ndim != 2 or not layer.size or layer.dtype.kind not in "iu" or layer.shape != shape:
        raise ConfigError(
            f"{what}: wanted whole numbers [tokens, top_k] of the shape of layer_0, "
            f"got {layer.dtype} {list(layer.shape)}"
        )
    if layer.min() < 0 or layer.max() >= num_experts:
        raise ConfigError(
            f"{what}: experts are {layer.min()} to {layer.max()}; wanted 0 to {num_experts - 1}"
        )
    return layer.astype(np.int64)
