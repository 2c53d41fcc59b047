"""The native attention and delta rule at models' sizes against torch in float64; a token does not see others' rows."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.attention import paged_attention
from moe_kernels.gated_delta import gated_delta_rule
from tests.kernels.implementations import INTERPRETED, NATIVE, on_threads
from tests.kernels.packing import assert_near, pack, random

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the native kernels are not Triton's")
BLOCK_SIZE = 16

threads = on_threads(1, 2)


class Prompts:
    """Sequences whose first tokens' keys and values are in the caches, and the step that computes the others."""

    def __init__(
        self,
        lengths: list[int],
        query_lens: list[int],
        *,
        heads: int,
        kv_heads: int,
        size: int,
        dtype: torch.dtype,
    ) -> None:
        self.lengths, self.query_lens = lengths, query_lens
        self.q, self.k, self.v, self.gate = (
            [random(n, h, size, seed=10 * i + part).to(dtype) for i, n in enumerate(lengths)]
            for part, h in enumerate((heads, kv_heads, kv_heads, heads))
        )
        blocks = [-(-n // BLOCK_SIZE) for n in lengths]
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).add(1).to(torch.int32)
        self.tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
        for row, own in zip(self.tables, order.split(blocks), strict=True):
            row[: len(own)] = own
        self.caches = [
            torch.full((sum(blocks) + 1, BLOCK_SIZE, kv_heads, size), torch.nan, dtype=dtype)
            for _ in range(2)
        ]
        for i, (length, new) in enumerate(zip(lengths, query_lens, strict=True)):
            for cache, values in zip(self.caches, (self.k[i], self.v[i]), strict=True):
                cache.flatten(0, 1)[self._slots(i, 0, length - new)] = values[: length - new]

    def _slots(self, i: int, start: int, stop: int) -> torch.Tensor:
        at = torch.arange(start, stop)
        return self.tables[i].long()[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE

    def _new(self, of_sequences: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([x[len(x) - new :] for x, new in zip(of_sequences, self.query_lens, strict=True)])

    def run(self, level: str) -> torch.Tensor:
        contexts = [n - new for n, new in zip(self.lengths, self.query_lens, strict=True)]
        slots = [self._slots(i, c, n) for i, (c, n) in enumerate(zip(contexts, self.lengths, strict=True))]
        return paged_attention(
            self._new(self.q),
            self._new(self.k),
            self._new(self.v),
            *self.caches,
            torch.cat(slots),
            self.tables,
            pack(self.query_lens, contexts, self.query_lens.count(1)),
            self.q[0].shape[-1] ** -0.5,
            self._new(self.gate),
            implementation=level,
        )

    def expected(self) -> torch.Tensor:
        """Torch's own attention over whole sequences, in float64."""
        outs = []
        for q, k, v, gate in zip(self.q, self.k, self.v, self.gate, strict=True):
            heads_first = [x.double().transpose(0, 1)[None] for x in (q, k, v)]
            out = torch.nn.functional.scaled_dot_product_attention(
                *heads_first, is_causal=True, enable_gqa=True
            )
            outs.append(out[0].transpose(0, 1) * gate.double().sigmoid())
        return self._new(outs)


@pytest.mark.parametrize("level", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [24, 64, 240, 256])
# Rows of a decode: one, two, three, and as many as are still read where they lie.
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1), (16, 2)])
def test_attention(heads: int, kv_heads: int, size: int, dtype: torch.dtype, level: str) -> None:
    prompts = Prompts(
        [1, 16, 17, 130, 70, 9], [1, 1, 1, 1, 3, 9], heads=heads, kv_heads=kv_heads, size=size, dtype=dtype
    )
    assert_near(prompts.run(level), prompts.expected())


@pytest.mark.parametrize("level", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 256])
def test_a_decode_is_bit_for_bit_a_prompts_last_token(size: int, dtype: torch.dtype, level: str) -> None:
    sizes = {"heads": 4, "kv_heads": 2, "size": size}
    whole = Prompts([100, 33], [100, 33], dtype=dtype, **sizes).run(level)
    decodes = Prompts([100, 33], [1, 1], dtype=dtype, **sizes).run(level)
    assert torch.equal(decodes, whole[[99, 132]])


@pytest.mark.parametrize("level", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("key_size", "value_size"), [(128, 128), (64, 100), (128, 208)])
def test_decodes_of_the_delta_rule(key_size: int, value_size: int, dtype: torch.dtype, level: str) -> None:
    tokens, key_heads, heads = 3, 2, 4
    q, k = (random(tokens, key_heads, key_size, seed=seed).to(dtype) for seed in (1, 2))
    v = random(tokens, heads, value_size, seed=3).to(dtype)
    decay, beta = -random(tokens, heads, seed=4).abs(), random(tokens, heads, seed=5).sigmoid().to(dtype)
    states, slots = random(5, heads, key_size, value_size, seed=6), [3, 1, 4]
    before = states.double()

    step = pack([1] * tokens, [7] * tokens, num_decodes=tokens)
    out = gated_delta_rule(q, k, v, decay, beta, states, torch.tensor(slots), step, implementation=level)

    unit_q, unit_k = (x.double() / (x.double().square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    unit_q, unit_k = (x.repeat_interleave(heads // key_heads, dim=1) for x in (unit_q, unit_k))
    kept = before[slots] * decay.double().exp()[..., None, None]
    update = beta.double()[..., None] * (v.double() - torch.einsum("thd,thdv->thv", unit_k, kept))
    after = kept + torch.einsum("thd,thv->thdv", unit_k, update)
    assert_near(states[slots], after, 2e-5)
    assert_near(out, torch.einsum("thd,thdv->thv", unit_q, after) * key_size**-0.5)
    assert torch.equal(states[[0, 2]].double(), before[[0, 2]])
