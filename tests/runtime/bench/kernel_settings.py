"""A setting of `bench kernels` so small that every case takes no time, and the rows that it has to have."""

from __future__ import annotations

import torch

from moe_kernels.select import KernelPlan
from moe_kernels.shapes import KernelShapes
from moe_runtime.bench.kernels.cases import Setting

# What is measured beside experts and products, on CPUs and GPUs, in the tables' order.
OPERATIONS = (
    "gated delta decode",
    "gated delta prefill",
    "convolution decode",
    "convolution prefill",
    "attention decode",
    "attention prefill",
    "RMSNorm",
    "gated RMSNorm",
    "rotary",
    "SiLU and multiply",
    "delta rule's gates",
    "routing",
)

SHAPES = KernelShapes(
    hidden_size=128,
    num_experts=12,
    num_local_experts=5,
    top_k=3,
    moe_intermediate_size=64,
    max_tokens=64,
    head_size=16,
    num_heads=4,
    num_kv_heads=2,
    key_size=16,
    value_size=8,
    num_key_heads=2,
    num_value_heads=4,
)


def small_setting(implementation: str, device: str = "cpu") -> Setting:
    """Odd numbers of tokens, and a cache that some inputs take several turns to leave."""
    return Setting(
        device=torch.device(device),
        plan=KernelPlan.uniform(implementation, "tested here"),
        shapes=SHAPES,
        cache_bytes=1 << 12,
        decode_sequences=3,
        context=37,
        prefill_tokens=70,
    )
