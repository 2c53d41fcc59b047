"""A kernel that can be made to break every rule that is held against the others."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.static_launch import StaticLaunch, TensorArgument


@triton.jit
def product_kernel(x, w, out, SIZE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """out [SIZE, SIZE] = x [SIZE, DEPTH] @ w [DEPTH, SIZE], in one piece."""
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    deep_rows, deep_columns = tl.arange(0, DEPTH)[:, None], tl.arange(0, DEPTH)[None, :]
    left, right = tl.load(x + rows * DEPTH + deep_columns), tl.load(w + deep_rows * SIZE + columns)
    product = tl.dot(left, right, input_precision=PRECISION)
    tl.store(out + rows * SIZE + columns, product.to(out.dtype.element_ty))


def product_launch(
    *, size: int, depth: int = 64, dtype: torch.dtype = torch.bfloat16, num_warps: int = 4
) -> StaticLaunch:
    """A product of [size, depth] and [depth, size] in one program."""
    return StaticLaunch(
        name="product decode",
        kernel=product_kernel,
        arguments=dict.fromkeys(("x", "w", "out"), TensorArgument(dtype)),
        constants={"SIZE": size, "DEPTH": depth, "PRECISION": "ieee"},
        num_warps=num_warps,
        num_stages=1,
        tile=f"{size}x{size}x{depth}",
        bytes_per_stage=0,
        mma=True,
        bytes_at_once=2 * size * depth * dtype.itemsize,
    )
