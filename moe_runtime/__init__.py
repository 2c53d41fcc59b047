"""moe_runtime: sparse mixture-of-experts language models served with expert parallelism on Ray.

Importing this package, or any module in it, never touches an accelerator; names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_runtime.async_llm import AsyncLLM
    from moe_runtime.inspection import ModelInfo, inspect_model
    from moe_runtime.llm import LLM
    from moe_runtime.request import (
        CompletionOutput,
        Logprob,
        RequestOutput,
        SamplingParams,
        StructuredOutputsParams,
    )

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "Logprob",
    "ModelInfo",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
    "inspect_model",
]

_HOME = {
    "LLM": "moe_runtime.llm",
    "AsyncLLM": "moe_runtime.async_llm",
    "CompletionOutput": "moe_runtime.request",
    "Logprob": "moe_runtime.request",
    "RequestOutput": "moe_runtime.request",
    "SamplingParams": "moe_runtime.request",
    "StructuredOutputsParams": "moe_runtime.request",
    "ModelInfo": "moe_runtime.inspection",
    "inspect_model": "moe_runtime.inspection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe_runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
