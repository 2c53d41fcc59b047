"""Every operator that the GPU path registers: what it says it changes, and its results on fake tensors."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

import moe_kernels.attention.flashinfer
import moe_kernels.attention.triton
import moe_kernels.conv.triton
import moe_kernels.gated_delta.fla
import moe_kernels.gated_delta.triton
import moe_kernels.grouped_gemm.triton
import moe_kernels.norm.triton
import moe_kernels.routing.triton  # noqa: F401 (each registers its own)
from moe_kernels.attention.launch import AttentionLaunch
from moe_kernels.gated_delta.launch import default_launch
from moe_kernels.grouped_gemm.launch import default_launch as experts_launch
from tests.kernels.packing import pack

_DEVICE = os.environ.get("MOE_TEST_DEVICE", "cpu")
# Adapters of libraries that are not there.
_OF_LIBRARIES = {"gated_delta_rule_fla", "paged_attention_flashinfer"}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def arguments() -> dict[str, tuple[Any, ...]]:
    """Of each operator: a decode, and a prompt of two tokens with a state that is kept."""
    sequences = pack([1, 2], [3, 0], 1, [(1, 1, 2)])
    tables = sequences.prefill_tables
    assert tables is not None
    slots, one_head, conv = torch.tensor([1, 0]), random(3, 1, 16), random(3, 16)
    experts, ids = random(2, 32, 16), torch.tensor([[0, 1], [1, -1], [-1, 0]])
    delta, angles = default_launch(torch.float32).to_list(), random(3, 4)
    contexts, blocks = sequences.context_lens_B, torch.tensor([[0], [1]], dtype=torch.int32)
    caches, kv_slots = (random(2, 16, 1, 16), random(2, 16, 1, 16)), torch.tensor([3, 16, 17])
    attention = (1, 4, 4, tables.tiles_L2, tables.sequences_S8, 0.25, one_head)
    return {
        "rms_norm": (conv, random(16), 1e-6, True),
        "rms_norm_gated": (conv, random(3, 16), random(16), 1e-6),
        "apply_rotary": (one_head, random(3, 1, 16), angles, angles),
        "silu_and_mul": (conv,),
        "route": (conv, 2, True),
        "delta_gates": (random(3, 2), random(3, 2), random(2), random(2)),
        "causal_conv1d": (
            *(conv, random(16, 4), random(3, 16, 3), slots, 1),
            *(tables.tiles_L2, tables.sequences_S8, tables.checkpoints_P2),
        ),
        "gated_delta_rule": (
            *(one_head, random(3, 1, 16), random(3, 1, 16), -random(3, 1).abs(), random(3, 1)),
            *(random(3, 1, 16, 16), slots, 1, tables.chunks_C3, tables.sequences_S8, delta),
        ),
        "paged_attention": (
            *(one_head, one_head, one_head, *caches, kv_slots, blocks, contexts),
            *(*attention, AttentionLaunch().to_list()),
        ),
        "fused_experts": (
            *(conv, ids, random(3, 2), experts, random(2, 16, 16), None, None),
            experts_launch(2, experts).to_ints(3),
        ),
    }


def test_these_are_all() -> None:
    registered = {
        name.split("::")[1].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("moe_kernels::")
    }
    assert set(arguments()) | _OF_LIBRARIES == registered


@pytest.mark.parametrize("name", arguments())
def test_operator(name: str) -> None:
    operator = getattr(torch.ops.moe_kernels, name).default
    there = tree_map_only(torch.Tensor, lambda x: x.to(_DEVICE), arguments()[name])
    torch.library.opcheck(operator, there, test_utils=("test_schema", "test_faketensor"))
