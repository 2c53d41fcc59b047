"""paged_attention against softmax written out in float64 over unpaged keys and values."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.attention import paged_attention
from tests.kernels.implementations import every_implementation
from tests.kernels.packing import TOLERANCE, assert_near, pack

implementation = every_implementation(paged_attention)

HEAD_SIZE, BLOCK_SIZE, BLOCKS = 8, 4, 80


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    context = k.shape[0] - q.shape[0]
    for t in range(q.shape[0]):
        for head in range(q.shape[1]):
            shared = head // (q.shape[1] // k.shape[1])
            weights = (scale * k[: context + t + 1, shared] @ q[t, head]).softmax(0)
            out[t, head] = weights @ v[: context + t + 1, shared]
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (6, 1)])
def test_ragged_batch_through_scattered_blocks(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    query_lens, context_lens = [1, 1, 5, 65, 1, 0, 3], [7, 64, 6, 0, 0, 3, 1]
    lengths = [q + c for q, c in zip(query_lens, context_lens, strict=True)]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q = random(sum(query_lens), heads, HEAD_SIZE) * 2
    keys = [random(n, kv_heads, HEAD_SIZE) for n in lengths]
    values = [random(n, kv_heads, HEAD_SIZE) for n in lengths]
    k_cache = torch.full((BLOCKS, BLOCK_SIZE, kv_heads, HEAD_SIZE), torch.nan, dtype=dtype)
    v_cache = k_cache.clone()
    free = torch.randperm(BLOCKS - 1, generator=generator).add(1).tolist()
    tables = torch.zeros(len(lengths), 18, dtype=torch.int32)
    kv_slots = []
    for i, length in enumerate(lengths):
        blocks = [free.pop() for _ in range(-(-length // BLOCK_SIZE))]
        tables[i, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        slots = [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)]
        for position in range(context_lens[i]):
            k_cache.view(-1, kv_heads, HEAD_SIZE)[slots[position]] = keys[i][position]
            v_cache.view(-1, kv_heads, HEAD_SIZE)[slots[position]] = values[i][position]
        kv_slots += slots[context_lens[i] :]
    new_k = torch.cat([k[c:] for k, c in zip(keys, context_lens, strict=True)])
    new_v = torch.cat([v[c:] for v, c in zip(values, context_lens, strict=True)])
    out = paged_attention(
        q,
        new_k,
        new_v,
        k_cache,
        v_cache,
        torch.tensor(kv_slots),
        tables,
        pack(query_lens, context_lens, 2),
        0.3,
    )
    assert out.dtype == dtype
    assert torch.equal(k_cache.flatten(0, 1)[kv_slots], new_k)
    assert torch.equal(v_cache.flatten(0, 1)[kv_slots], new_v)
    start = 0
    for i, count in enumerate(query_lens):
        if count:
            wanted = by_hand(q[start : start + count], keys[i], values[i], 0.3)
            assert_near(out[start : start + count], wanted)
        start += count


def test_no_tokens() -> None:
    cache = torch.empty(2, BLOCK_SIZE, 1, HEAD_SIZE)
    none = torch.empty(0, dtype=torch.int64)
    q = torch.empty(0, 2, HEAD_SIZE)
    tables = torch.empty(0, 0, dtype=torch.int32)
    out = paged_attention(q, q[:, :1], q[:, :1], cache, cache.clone(), none, tables, pack([], []), 1.0)
    assert out.shape == q.shape
