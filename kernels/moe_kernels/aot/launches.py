"""Every operation's Triton launches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

import moe_kernels.attention.static as attention
import moe_kernels.conv.static as conv
import moe_kernels.gated_delta.static as gated_delta
import moe_kernels.grouped_gemm.static as grouped_gemm
import moe_kernels.norm.static as norm
import moe_kernels.quant.static as quant
import moe_kernels.routing.static as routing
from moe_kernels.aot.qwen3_next import qwen3_next_80b
from moe_kernels.grouped_gemm.tables import WEIGHTS, load_table
from moe_kernels.shapes import KernelShapes
from moe_kernels.static_launch import StaticLaunch

# Those whose launches depend on the type of the experts' weights, and all.
_EXPERTS = (grouped_gemm, quant)
OPERATIONS = (*_EXPERTS, routing, gated_delta, conv, attention, norm)


def all_launches(shapes: KernelShapes, dtype: torch.dtype, capability: tuple[int, int]) -> list[StaticLaunch]:
    """What a rank with a model of these shapes launches, with weights in `dtype`.

    With float8_e4m3fn, only the operations that have such weights; what surrounds them is in bfloat16.
    """
    operations = _EXPERTS if dtype == torch.float8_e4m3fn else OPERATIONS
    return [launch for module in operations for launch in module.static_launches(shapes, dtype, capability)]


def table_launches(capability: tuple[int, int]) -> Iterator[tuple[StaticLaunch, torch.dtype, int]]:
    """Of every row of an architecture's experts' table, with its weights' type and number of local experts.

    What no rank of Qwen3-Next-80B may reach is there, too: rows are for whoever has their key.
    """
    for key, rows in load_table("sm_{}{}".format(*capability)).items():
        shapes = replace(
            qwen3_next_80b(1),
            num_local_experts=key.local_experts,
            hidden_size=key.hidden_size,
            moe_intermediate_size=key.intermediate_size,
        )
        dtype = WEIGHTS[key.weights]
        for launch in grouped_gemm.launches_of_rows(rows, shapes, dtype, capability):
            yield launch, dtype, key.local_experts
