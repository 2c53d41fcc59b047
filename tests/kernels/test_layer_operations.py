"""Kernels at a real model's sizes, on slices as layers pass them, against the references in float64."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.attention import paged_attention
from moe_kernels.conv import causal_conv1d
from moe_kernels.gated_delta import delta_gates, gated_delta_rule
from moe_kernels.norm import apply_rotary, rms_norm, rms_norm_gated, silu_and_mul
from tests.kernels.implementations import IMPLEMENTATIONS, INTERPRETED, on_threads
from tests.kernels.packing import TOLERANCE, assert_near, pack, random

FAST = [name for name in IMPLEMENTATIONS if name != "reference"]
pytestmark = pytest.mark.skipif(not FAST, reason="this machine has no compiled kernels")

DTYPES = [torch.float32, torch.bfloat16]
# In the interpreter, where it takes long, `interpreted/test_attention.py` has the same.
REPEATED = [pytest.mark.slow] if INTERPRETED else []
QUERY_LENS, CONTEXT_LENS, SLOTS, DECODES = [1, 1, 131, 1, 0, 20], [9, 70, 33, 0, 4, 0], [6, 0, 2, 5, 4, 1], 2
CHECKPOINTS = [(2, 64, 7), (2, 100, 8), (5, 20, 9)]
TOKENS, NUM_SLOTS = sum(QUERY_LENS), 10

threads = on_threads(*([1] if INTERPRETED else [1, 2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(("key_heads", "heads", "key", "value"), [(2, 4, 128, 128), (1, 3, 24, 96)])
def test_gated_delta_rule(
    key_heads: int, heads: int, key: int, value: int, implementation: str, dtype: torch.dtype
) -> None:
    mixed = random(TOKENS, (2 * key_heads * key) + heads * value).to(dtype)
    q, k, v = mixed.split([key_heads * key, key_heads * key, heads * value], dim=-1)
    q, k = (x.unflatten(-1, (key_heads, key)) for x in (q, k))
    v = v.unflatten(-1, (heads, value))
    # Some heads forget at once, others nearly never.
    decay = -random(TOKENS, heads, seed=1).abs() * torch.tensor([0.01, 1.0, 8.0, 30.0])[:heads]
    beta = random(TOKENS, heads, seed=2).sigmoid().to(dtype)
    state = random(NUM_SLOTS, heads, key, value, seed=3)
    for slot, context in zip(SLOTS, CONTEXT_LENS, strict=True):
        if context == 0:
            state[slot] = torch.nan
    state64 = state.double()
    sequences, slots = pack(QUERY_LENS, CONTEXT_LENS, DECODES, CHECKPOINTS), torch.tensor(SLOTS)
    wide = (x.double() for x in (q, k, v, decay, beta))
    wanted = gated_delta_rule(*wide, state64, slots, sequences)
    out = gated_delta_rule(q, k, v, decay, beta, state, slots, sequences, implementation=implementation)
    assert_near(out, wanted)
    # The Triton prefill multiplies what it adds to a state in the inputs' type, on tensor cores.
    of_state = TOLERANCE[dtype if implementation == "triton" else state.dtype]
    assert_near(state[[0, 1, 2, 3, 4, 6, 7, 8, 9]], state64[[0, 1, 2, 3, 4, 6, 7, 8, 9]], of_state)
    assert_near(state[5], state64[5], of_state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", FAST)
def test_delta_gates(implementation: str, dtype: torch.dtype) -> None:
    b, a = (random(7, 12) * 8).to(dtype).chunk(2, dim=-1)
    a_log, dt_bias = random(6, seed=1), random(6, seed=2) * 4
    wanted_decay, wanted_beta = delta_gates(a.double(), b.double(), a_log.double(), dt_bias.double())
    decay, beta = delta_gates(a, b, a_log, dt_bias, implementation=implementation)
    assert (decay.dtype, beta.dtype) == (torch.float32, dtype)
    assert_near(decay, wanted_decay.double(), 1e-5)
    assert_near(beta, wanted_beta)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", FAST)
def test_causal_conv1d(implementation: str, dtype: torch.dtype) -> None:
    channels = 200
    x = random(TOKENS, channels + 40).to(dtype)[:, :channels]
    weight, state = random(channels, 4, seed=1).to(dtype), random(NUM_SLOTS, channels, 3, seed=2).to(dtype)
    state64 = state.double()
    sequences, slots = pack(QUERY_LENS, CONTEXT_LENS, DECODES, CHECKPOINTS), torch.tensor(SLOTS)
    wanted = causal_conv1d(x.double(), weight.double(), state64, slots, sequences)
    assert_near(causal_conv1d(x, weight, state, slots, sequences, implementation=implementation), wanted)
    assert torch.equal(state.double(), state64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [pytest.param(*heads, marks=REPEATED) for heads in [(16, 2, 256), (4, 4, 72), (32, 1, 64)]],
)
def test_gated_attention(
    heads: int, kv_heads: int, size: int, implementation: str, dtype: torch.dtype
) -> None:
    block_size, num_blocks = 16, 64
    parts = [heads * size, heads * size, kv_heads * size, kv_heads * size]
    q, gate, k, v = random(TOKENS, sum(parts)).to(dtype).split(parts, dim=-1)
    q, gate = (x.unflatten(-1, (heads, size)) for x in (q, gate))
    k, v = (x.unflatten(-1, (kv_heads, size)) for x in (k, v))
    caches = random(2, num_blocks, block_size, kv_heads, size, seed=1).to(dtype)
    tables = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2))[: 6 * 10].view(6, 10)
    positions = [
        (i, c + t) for i, (n, c) in enumerate(zip(QUERY_LENS, CONTEXT_LENS, strict=True)) for t in range(n)
    ]
    kv_slots = torch.tensor([int(tables[i, p // 16]) * 16 + p % 16 if p < 160 else 0 for i, p in positions])
    sequences = pack(QUERY_LENS, [c if c != 33 else 20 for c in CONTEXT_LENS], DECODES)
    kv_slots[2:133] = torch.tensor([int(tables[2, p // 16]) * 16 + p % 16 for p in range(20, 151)])
    rest = kv_slots, tables.int(), sequences, size**-0.5
    wide = [x.double() for x in (q, k, v, *caches)]
    wanted = paged_attention(*wide, *rest, gate.double())
    out = paged_attention(q, k, v, *caches, *rest, gate, implementation=implementation)
    assert_near(out, wanted)
    assert torch.equal(torch.stack([wide[3], wide[4]]), caches.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", FAST)
def test_row_by_row_operations_on_slices(implementation: str, dtype: torch.dtype) -> None:
    num_rows = 30 if INTERPRETED else 300
    x = random(num_rows, 4 * 264).to(dtype)
    rows, gate = x[:, :512].unflatten(-1, (2, 256)), x[:, 512:1024].unflatten(-1, (2, 256))
    weight = random(256, seed=1).to(dtype)
    use = {"implementation": implementation}
    wanted = rms_norm(rows.double(), weight.double(), 1e-6, True)
    assert_near(rms_norm(rows, weight, 1e-6, True, **use), wanted)
    wanted = rms_norm_gated(rows.double(), gate.double(), weight.double(), 1e-6)
    assert_near(rms_norm_gated(rows, gate, weight, 1e-6, **use), wanted)
    assert_near(silu_and_mul(x[:, :512], **use), silu_and_mul(x[:, :512].double()))
    angles = random(num_rows, 32, seed=2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    turned = apply_rotary(rows, gate, cos, sin, **use)
    for got, exact in zip(
        turned, apply_rotary(rows.double(), gate.double(), cos.double(), sin.double()), strict=True
    ):
        assert_near(got, exact)
