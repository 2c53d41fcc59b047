"""From a checkpoint to a model on this rank's device, its weights read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue

import torch

from moe_kernels.device import DeviceProfile
from moe_kernels.huge_pages import advise_huge_pages
from moe_kernels.libraries import available_libraries
from moe_kernels.select import KernelPlan, select
from moe_kernels.shapes import KernelShapes
from moe_models.interfaces import CausalLM, ExpertShard, ModelDescription
from moe_runtime.errors import ConfigError
from moe_runtime.modelfiles import ModelFiles
from moe_runtime.quantization import find_quantization, kept_quantization, weight_formats
from moe_runtime.rank_spec import RankSpec
from moe_runtime.registry import ModelTarget
from moe_runtime.weights.index import read_index
from moe_runtime.weights.load import load_weights

_PROGRESS_INTERVAL_S = 0.2


def describe_model(target: ModelTarget, files: ModelFiles) -> ModelDescription:
    """The facts of the model's configuration.

    Raises:
        ConfigError: config.json cannot be used.
    """
    model_class: type[CausalLM] = target.load()
    try:
        return model_class.describe(files.config)
    except ValueError as error:
        raise ConfigError(f"{files.name}: config.json: {error}") from error


def choose_kernels(
    profile: DeviceProfile, spec: RankSpec, facts: ModelDescription, dtype: torch.dtype
) -> KernelPlan:
    """The rank's kernels, and what they keep the weights in.

    Raises:
        ConfigError: the kernels that the environment forces cannot do it.
    """
    config = spec.config
    method = find_quantization(spec.model_files.config, config.quantization)
    formats = weight_formats(kept_quantization(method, profile.kind), facts.moe_intermediate_size)
    weights = formats.dtypes()
    num_local = len(spec.placement.experts_of_rank[spec.rank])
    max_tokens = spec.placement.num_ranks * config.max_num_batched_tokens
    try:
        plan = select(
            profile,
            kernel_shapes(facts, num_local, max_tokens, weights["experts"]),
            dtype,
            family=os.environ.get("MOE_RUNTIME_KERNELS", "auto"),
            # One warning speaks for all ranks of a node, which share its libraries.
            libraries=available_libraries(profile.kind, warn=spec.index_on_node == 0),
        )
    except ValueError as error:
        raise ConfigError(f"{error}; change MOE_RUNTIME_KERNELS, dtype or quantization") from error
    return plan.with_weights(**weights)


def kernel_shapes(
    facts: ModelDescription,
    num_local_experts: int,
    max_tokens: int,
    expert_dtype: torch.dtype | None = None,
) -> KernelShapes:
    """What the choice of kernels depends on, for a rank that `max_tokens` tokens may reach at once."""
    return KernelShapes(
        hidden_size=facts.hidden_size,
        num_experts=facts.num_experts,
        num_local_experts=num_local_experts,
        top_k=facts.num_experts_per_tok,
        moe_intermediate_size=facts.moe_intermediate_size,
        max_tokens=max_tokens,
        head_size=facts.head_size,
        num_heads=facts.num_attention_heads,
        num_kv_heads=facts.num_kv_heads,
        key_size=facts.linear_key_size,
        value_size=facts.linear_value_size,
        num_key_heads=facts.num_linear_key_heads,
        num_value_heads=facts.num_linear_value_heads,
        conv_width=facts.linear_conv_width,
        expert_dtype=expert_dtype,
    )


def build_model(
    target: ModelTarget,
    files: ModelFiles,
    shard: ExpertShard,
    plan: KernelPlan,
    dtype: torch.dtype,
    device: torch.device,
) -> CausalLM:
    """The model with uninitialised parameters on `device`.

    Raises:
        ConfigError: the weights do not fit into the GPU's free memory.
    """
    model_class: type[CausalLM] = target.load()
    if device.type == "cuda":
        _check_fits(_build(model_class, files, shard, plan, dtype, torch.device("meta")), device)
    return _build(model_class, files, shard, plan, dtype, device)


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
            model = model_class(files.config, shard, plan).eval()
    finally:
        torch.set_default_dtype(before)
    advise_huge_pages(model.parameters())
    return model


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
