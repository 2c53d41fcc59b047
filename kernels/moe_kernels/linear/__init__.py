"""One matrix product with a weight: every linear layer that is not an expert's.

Shape legend: T tokens (or any leading dimensions), N output features, K input features.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_kernels.implementations import find_implementation

_TABLE = {
    "reference": "moe_kernels.linear.reference:linear",
    "float32": "moe_kernels.linear.reference:linear_float32",
    "cpu": "moe_kernels.linear.cpu:linear",
}


def linear(
    x: torch.Tensor,
    weight_NK: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    implementation: str = "reference",
    launch: Any = None,
) -> torch.Tensor:
    """x @ weight^T, [..., K] to [..., N] in x's dtype.

    A quantised weight has a float32 `scale`: [N] for an int8 weight (w = weight * scale of its row),
    [ceil(N / 128), ceil(K / 128)] for a float8_e4m3fn one (a factor for each block of 128 x 128).
    """
    run = find_implementation("linear", _TABLE, implementation)
    return run(x, weight_NK, scale) if launch is None else run(x, weight_NK, scale, launch=launch)
