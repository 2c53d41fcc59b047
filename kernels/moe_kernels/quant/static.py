"""The launches that round activations to float8, as values, to be compiled with no GPU there."""

from __future__ import annotations

import torch

from moe_kernels.quant import BLOCK
from moe_kernels.quant.triton import quantize_rows
from moe_kernels.shapes import KernelShapes
from moe_kernels.static_launch import StaticLaunch, TensorArgument


def static_launches(
    shapes: KernelShapes, dtype: torch.dtype, capability: tuple[int, int]
) -> list[StaticLaunch]:
    """Of a token and of an expert's hidden row; none where weights are not float8, or no GPU multiplies it."""
    if dtype != torch.float8_e4m3fn or capability < (8, 9):
        return []
    sizes = {"tokens": (shapes.hidden_size, False), "hidden": (shapes.moe_intermediate_size, True)}
    return [
        StaticLaunch(
            name=f"quant.activations {name}",
            kernel=quantize_rows,
            arguments={
                "x": TensorArgument(torch.bfloat16),
                "codes": TensorArgument(torch.float8_e4m3fn),
                "scale": TensorArgument(torch.float32),
                "num_rows": TensorArgument(torch.int32 if limited else torch.float32),
            },
            constants={"COLUMNS": columns, "BLOCK": BLOCK, "LIMITED": limited},
            num_warps=1,
            num_stages=3,
            tile=str(BLOCK),
            bytes_per_stage=0,
            mma=False,
        )
        for name, (columns, limited) in sizes.items()
    ]
