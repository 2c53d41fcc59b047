"""Registering a GPU implementation with torch, so that a forward pass can be dry-run on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("moe_kernels", "DEF")


def custom_op(schema: str, *, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make the function the operator `moe_kernels::<schema>`, and return what calls it.

    Args:
        schema: as in "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor"; what is changed in place is
            marked, as in "Tensor(a!) state".
        fake: makes results of the right shape, dtype and device without computing; it may read no value of
            a tensor.

    The CPU implementation is the same function: Triton's interpreter runs there.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema)
        for key in ("CUDA", "CPU"):
            _LIBRARY.impl(name, function, key)
        torch.library.register_fake(f"moe_kernels::{name}", fake, lib=_LIBRARY)
        operator: Callable[..., Any] = getattr(torch.ops.moe_kernels, name).default
        return operator

    return register
