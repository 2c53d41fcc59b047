"""The product in native code: weights are read where they lie, sums are kept in float32."""

from __future__ import annotations

import torch

from moe_kernels.linear import reference
from moe_kernels.native.library import native_function
from moe_kernels.native.signatures import ELEMENT_TYPES


def linear(
    x: torch.Tensor, weight_NK: torch.Tensor, scale: torch.Tensor | None = None, *, isa: str
) -> torch.Tensor:
    """See `moe_kernels.linear.linear`; float16, float64 and float8 are the reference's, in plain torch.

    A row's result depends neither on the rows beside it nor on the number of threads.

    Args:
        isa: instruction set, one of `moe_kernels.native.units.LEVELS`.

    Raises:
        NativeBuildError: there is no native library on this machine.
    """
    if x.dtype not in (torch.float32, torch.bfloat16) or weight_NK.dtype not in ELEMENT_TYPES:
        return reference.linear(x, weight_NK, scale)
    num_weights, depth = weight_NK.shape
    x_TK = x.reshape(-1, depth)
    x_TK = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    # Kept by name until the call is over, as only their addresses are handed on.
    weight_NK, scale = weight_NK.contiguous(), None if scale is None else scale.contiguous()
    y = x.new_empty(*x.shape[:-1], num_weights)
    status = native_function("moe_linear", isa)(
        x_TK.data_ptr(),
        x_TK.stride(0),
        ELEMENT_TYPES[x.dtype],
        weight_NK.data_ptr(),
        ELEMENT_TYPES[weight_NK.dtype],
        None if scale is None else scale.data_ptr(),
        y.data_ptr(),
        x_TK.shape[0],
        num_weights,
        depth,
        torch.get_num_threads(),
    )
    if status:
        raise MemoryError(f"no memory for the product of {tuple(x.shape)} with {tuple(weight_NK.shape)}")
    return y
