"""The sizes of Qwen3-Next-80B-A3B on one rank, for expert parallelism over several numbers of ranks."""

from __future__ import annotations

from moe_kernels.shapes import KernelShapes

EXPERT_PARALLEL_SIZES = (1, 8, 16, 32)
_NUM_EXPERTS = 512
_MAX_TOKENS = 8192  # rows at the experts at once


def qwen3_next_80b(expert_parallel_size: int) -> KernelShapes:
    """Sizes from the `config.json` of Qwen/Qwen3-Next-80B-A3B-Instruct; attention is not split."""
    return KernelShapes(
        hidden_size=2048,
        num_experts=_NUM_EXPERTS,
        num_local_experts=_NUM_EXPERTS // expert_parallel_size,
        top_k=10,
        moe_intermediate_size=512,
        max_tokens=_MAX_TOKENS,
        head_size=256,
        num_heads=16,
        num_kv_heads=2,
        key_size=128,
        value_size=128,
        num_key_heads=16,
        num_value_heads=32,
    )
