"""What the layers in one call cannot compute, as the operations in them cannot."""

from __future__ import annotations

import torch

from moe_kernels.shapes import KernelShapes

# MAX_KEY of delta.cpp, MAX_WIDTH of conv.cpp, MAX_HEAD and ROWS of attention_rows.h, MAX_EXPERTS of routing.cpp.
_MAX_KEY_SIZE, _MAX_CONV_WIDTH, _MAX_HEAD_SIZE, _MAX_GROUP, _MAX_EXPERTS = 256, 16, 256, 32, 4096
_DTYPES = (torch.float32, torch.bfloat16)


def obstacle(shapes: KernelShapes, dtype: torch.dtype) -> str | None:
    """Why a model of these shapes has to be computed operation by operation; None: it has not."""
    if dtype not in _DTYPES:
        return f"layers in one call do not compute in {dtype}"
    group = shapes.num_heads // max(shapes.num_kv_heads, 1)
    for what, size, most in (
        ("key size of Gated DeltaNet", shapes.key_size, _MAX_KEY_SIZE),
        ("convolution width of Gated DeltaNet", shapes.conv_width, _MAX_CONV_WIDTH),
        ("head size of attention", shapes.head_size, _MAX_HEAD_SIZE),
        ("query heads of a key head", group, _MAX_GROUP),
        ("number of experts", shapes.num_experts, _MAX_EXPERTS),
    ):
        if size > most:
            return f"the {what} is {size}, layers in one call have at most {most}"
    return None
