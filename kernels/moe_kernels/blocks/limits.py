"""What the layers in one call cannot compute, as the operations in them cannot."""

from __future__ import annotations

import torch

from moe_kernels.attention.cpu import MAX_GROUP, MAX_HEAD
from moe_kernels.conv.cpu import MAX_WIDTH
from moe_kernels.gated_delta.cpu import MAX_KEY_SIZE
from moe_kernels.routing.cpu import MAX_EXPERTS
from moe_kernels.shapes import KernelShapes

_DTYPES = (torch.float32, torch.bfloat16)


def obstacle(shapes: KernelShapes, dtype: torch.dtype) -> str | None:
    """Why a model of these shapes has to be computed operation by operation; None: it has not."""
    if dtype not in _DTYPES:
        return f"layers in one call do not compute in {dtype}"
    group = shapes.num_heads // max(shapes.num_kv_heads, 1)
    for what, size, most in (
        ("key size of Gated DeltaNet", shapes.key_size, MAX_KEY_SIZE),
        ("convolution width of Gated DeltaNet", shapes.conv_width, MAX_WIDTH),
        ("head size of attention", shapes.head_size, MAX_HEAD),
        ("query heads of a key head", group, MAX_GROUP),
        ("number of experts", shapes.num_experts, MAX_EXPERTS),
    ):
        if size > most:
            return f"the {what} is {size}, layers in one call have at most {most}"
    return None
