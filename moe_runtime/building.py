"""From a checkpoint to a model on this rank's device, its weights read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue

import torch

from moe_kernels.select import KernelPlan
from moe_models.interfaces import CausalLM, ExpertShard, ModelDescription
from moe_runtime.errors import ConfigError
from moe_runtime.modelfiles import ModelFiles
from moe_runtime.registry import ModelTarget
from moe_runtime.weights.index import read_index
from moe_runtime.weights.load import load_weights

_PROGRESS_INTERVAL_S = 0.2


def build_model(
    target: ModelTarget,
    files: ModelFiles,
    shard: ExpertShard,
    plan: KernelPlan,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[CausalLM, ModelDescription]:
    """The model with uninitialised parameters on `device`, and the facts of its configuration.

    Raises:
        ConfigError: config.json cannot be used, or the weights do not fit into the GPU's free memory.
    """
    model_class: type[CausalLM] = target.load()
    try:
        facts = model_class.describe(files.config)
    except ValueError as error:
        raise ConfigError(f"{files.name}: config.json: {error}") from error
    if device.type == "cuda":
        _check_fits(_build(model_class, files, shard, plan, dtype, torch.device("meta")), device)
    return _build(model_class, files, shard, plan, dtype, device), facts


def _build(
    model_class: type[CausalLM],
    files: ModelFiles,
    shard: ExpertShard,
    plan: KernelPlan,
    dtype: torch.dtype,
    device: torch.device,
) -> CausalLM:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return model_class(files.config, shard, plan).eval()
    finally:
        torch.set_default_dtype(before)


def read_weights(model: CausalLM, files: ModelFiles) -> Iterator[int]:
    """Fill the model's parameters in a thread beside this one; yields the bytes read, a few times a second.

    Raises:
        CheckpointError: the checkpoint's files are broken, or its tensors are not the model's.
    """
    index = read_index(files)
    weight_map = model.weight_map(index.__contains__)
    progress: SimpleQueue[int] = SimpleQueue()
    with ThreadPoolExecutor(max_workers=1) as pool:
        loading = pool.submit(load_weights, model, weight_map, index, on_progress=progress.put)
        while not loading.done():
            wait([loading], timeout=_PROGRESS_INTERVAL_S)
            yield sum(progress.get() for _ in range(progress.qsize()))
        loading.result()


def _check_fits(model: CausalLM, device: torch.device) -> None:
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    free, total = torch.cuda.mem_get_info(device)
    if needed > free:
        raise ConfigError(
            f"this rank's weights take {needed / 1e9:.1f} GB, its GPU has {free / 1e9:.1f} GB free of "
            f"{total / 1e9:.1f} GB; raise expert_parallel_size, or end what else uses the GPU"
        )
