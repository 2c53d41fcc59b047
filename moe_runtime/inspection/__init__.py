"""Inspection: what a model is, learnt in a CPU-only Ray task without its weights and without an accelerator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.errors import ConfigError
from moe_runtime.inspection import cache
from moe_runtime.inspection.fit import Fit
from moe_runtime.inspection.model_info import InspectionFacts, ModelInfo, TokenizerFacts
from moe_runtime.modelfiles import dtype_name
from moe_runtime.quantization import find_quantization, kept_quantization
from moe_runtime.registry import resolve_target

if TYPE_CHECKING:
    from moe_runtime.modelfiles import ModelFiles

__all__ = ["Fit", "InspectionFacts", "ModelInfo", "TokenizerFacts", "inspect_model"]


def inspect_model(
    model: str | os.PathLike[str] | ModelFiles | None = None,
    expert_parallel_size: int | None = None,
    timeout_s: float = 60.0,
    *,
    model_class: str | type | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    device: str = "cuda",
    revision: str | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    use_cache: bool = True,
) -> ModelInfo:
    """Learn what a model is. This process imports neither the model's module nor torch for it.

    A Ray task without CPUs or GPUs imports the class in a fresh interpreter of the workers' environment, with
    every touch of an accelerator trapped, and builds it on the meta device. A success is cached.

    Args:
        model: a checkpoint directory, a config.json, a Hub id, or files that were resolved already; None is
            the demo checkpoint. Only the configuration is needed.
        expert_parallel_size: refused unless the model has that many experts; None checks nothing.
        timeout_s: after which the inspecting process is killed.
        model_class: `"module:Class"` or a class where no registered one is meant; a class defined in the
            driver's own script is shipped by value.
        dtype: of the parameters; "auto" is the configuration's own.
        quantization: "int8", or None for the checkpoint's own.
        device: of the ranks; on "cpu" the experts of an FP8 checkpoint are counted in `dtype`.
        revision: of a Hub id.
        runtime_env: of the workers, where it differs from that of the Ray job.
        use_cache: False inspects anew and replaces the cached answer.

    Raises:
        ModelNotFoundError, ConfigError: no such model, or its config.json cannot be used (an unsupported
            quantisation is such a reason).
        UnknownArchitectureError: no registered class has its architecture's name.
        ModelImportError, AcceleratorTouchError, InspectionTimeoutError, InspectionCrashError, InspectionError:
            the class could not be inspected. None of these is cached.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not timeout_s > 0:
        raise ConfigError(f"timeout_s must be a number of seconds above 0, got {timeout_s!r}")
    files = _resolve(model, revision)
    target = resolve_target(files.config, model_class)
    method = find_quantization(files.config, quantization)
    request = {
        "target": target.to_dict(),
        "config": files.config,
        "dtype": dtype_name(files.config, dtype),
        "quantization": method,
        "kept_quantization": kept_quantization(method, device),
    }
    tokenizer_config = files.tokenizer_config or {}
    tokenizer = _tokenizer_facts(files.config, tokenizer_config, Path(files.path))
    key = cache.cache_key(request, {**tokenizer, "tokenizer_config": tokenizer_config}, runtime_env)
    info = cache.lookup(key) if use_cache else None
    if info is None:
        # Imported here: an answer from the cache needs none of it.
        from moe_runtime.inspection.remote import inspect_remotely

        reply = inspect_remotely(request, timeout_s, runtime_env)
        facts = reply["info"]
        info = ModelInfo.from_dict({**facts, "tokenizer": {"vocab_size": facts["vocab_size"], **tokenizer}})
        if reply["manifest"] is not None:
            cache.store(key, info, reply["manifest"])
    if expert_parallel_size is not None:
        info.check_ep_size(expert_parallel_size)
    return info


def _resolve(model: str | os.PathLike[str] | ModelFiles | None, revision: str | None) -> ModelFiles:
    from moe_runtime.modelfiles import ModelFiles, resolve_model

    return model if isinstance(model, ModelFiles) else resolve_model(model, revision, config_only=True)


def _tokenizer_facts(
    config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """TokenizerFacts but for the vocabulary, which the model's own description gives."""
    eos_ids = config.get("eos_token_id")
    template_files = ("chat_template.jinja", "chat_template.json")
    return {
        "has_chat_template": bool(tokenizer_config.get("chat_template"))
        or any((folder / name).is_file() for name in template_files),
        "eos_token": _token_text(tokenizer_config.get("eos_token")),
        "bos_token": _token_text(tokenizer_config.get("bos_token")),
        "eos_token_ids": [] if eos_ids is None else eos_ids if isinstance(eos_ids, list) else [eos_ids],
    }


def _token_text(token: object) -> str | None:
    """A special token is written as text or as a table with its `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
