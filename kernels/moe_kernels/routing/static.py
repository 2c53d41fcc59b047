"""The launch of the routing kernel as a value, to be compiled with no GPU there."""

from __future__ import annotations

import torch

from moe_kernels.routing.triton import route_kernel, route_sizes, route_warps
from moe_kernels.shapes import KernelShapes
from moe_kernels.static_launch import StaticLaunch, TensorArgument


def static_launches(
    shapes: KernelShapes, dtype: torch.dtype, capability: tuple[int, int]
) -> list[StaticLaunch]:
    """One launch whatever the number of tokens; none for a model without experts."""
    if not shapes.num_experts:
        return []
    sizes = route_sizes(shapes.num_experts, shapes.top_k)
    x = TensorArgument(dtype)
    return [
        StaticLaunch(
            name="routing.route",
            kernel=route_kernel,
            arguments={
                "logits": x,
                "ids": TensorArgument(torch.int64),
                "weights": x,
                "stride": shapes.num_experts,
            },
            constants={**sizes, "RENORMALIZE": True},
            num_warps=route_warps(shapes.num_experts),
            num_stages=3,
            tile=str(sizes["EXPERTS"]),
            bytes_per_stage=0,
            mma=False,
        )
    ]
