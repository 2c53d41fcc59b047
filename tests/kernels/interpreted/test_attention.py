"""The Triton kernels of paged attention against the reference in float64, with NaN wherever nothing was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from moe_kernels.attention import paged_attention
from moe_kernels.attention.launch import AttentionLaunch, launch_for
from moe_kernels.sequences import PackedSequences
from tests.kernels.packing import assert_near, pack

DTYPES = [torch.float32, torch.bfloat16]
HEADS = [(16, 2, 256), (4, 4, 72), (32, 1, 64)]


@pytest.fixture(autouse=True)
def _rubbish_in_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `new_empty` and `empty` return is NaN until it is written."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of `paged_attention`; q, gate, k and v are slices of wider tensors, as layers have them."""

    q: torch.Tensor
    gate: torch.Tensor | None
    k: torch.Tensor
    v: torch.Tensor
    caches: torch.Tensor  # both, in blocks in no order; NaN but for the contexts
    kv_slots: torch.Tensor
    tables: torch.Tensor  # past a sequence's end: a block of NaN
    sequences: PackedSequences

    def run(
        self, implementation: str, dtype: torch.dtype, launch: AttentionLaunch | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The result in this type, and the caches after it."""
        caches = self.caches.to(dtype, copy=True)
        q, k, v = (x if x.dtype == dtype else x.to(dtype) for x in (self.q, self.k, self.v))
        gate = self.gate if self.gate is None or self.gate.dtype == dtype else self.gate.to(dtype)
        arguments = (q, k, v, *caches, self.kv_slots, self.tables, self.sequences, q.shape[2] ** -0.5, gate)
        return paged_attention(*arguments, implementation=implementation, launch=launch), caches


def make(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    num_decodes: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    block_size: int = 16,
    has_gate: bool = True,
) -> Case:
    num_heads, num_kv_heads, size = heads
    generator = torch.Generator().manual_seed(0)
    widths, num_tokens = [num_heads * size, num_kv_heads * size], sum(query_lens)
    # No two tensors that a kernel reads together have their tokens equally far apart.
    q, k = torch.randn(num_tokens, sum(widths), generator=generator).to(dtype).split(widths, dim=1)
    gate, v, _ = (
        torch.randn(num_tokens, sum(widths) + 8, generator=generator).to(dtype).split([*widths, 8], 1)
    )
    lengths = [q + c for q, c in zip(query_lens, context_lens, strict=True)]
    counts = [-(-length // block_size) for length in lengths]
    free = (1 + torch.randperm(sum(counts), generator=generator)).tolist()  # block 0 is nobody's
    tables = torch.zeros(len(lengths), max(counts, default=0) + 2, dtype=torch.int32)
    caches = torch.full((2, len(free) + 1, block_size, num_kv_heads, size), torch.nan, dtype=dtype)
    kv_slots: list[int] = []
    for i, (context, length, count) in enumerate(zip(context_lens, lengths, counts, strict=True)):
        blocks, free = free[:count], free[count:]
        tables[i, :count] = torch.tensor(blocks, dtype=torch.int32)
        slots = [blocks[p // block_size] * block_size + p % block_size for p in range(length)]
        old = torch.randn(2, context, num_kv_heads, size, generator=generator).to(dtype)
        caches.flatten(1, 2)[:, slots[:context]] = old
        kv_slots += slots[context:]
    return Case(
        q=q.unflatten(1, (num_heads, size)),
        gate=gate.unflatten(1, (num_heads, size)) if has_gate else None,
        k=k.unflatten(1, (num_kv_heads, size)),
        v=v.unflatten(1, (num_kv_heads, size)),
        caches=caches,
        kv_slots=torch.tensor(kv_slots, dtype=torch.int64),
        tables=tables,
        sequences=pack(query_lens, context_lens, num_decodes),
    )


def check(case: Case, launch: AttentionLaunch | None = None) -> None:
    wanted, wanted_caches = case.run("reference", torch.float64)
    out, caches = case.run("triton", case.q.dtype, launch)
    assert out.dtype == case.q.dtype
    assert_near(out, wanted)
    torch.testing.assert_close(caches.double(), wanted_caches, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_decodes_and_prefills_in_one_step(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    # Decodes, a continued sequence over more than one tile, one without tokens, new ones.
    query_lens, context_lens = [1, 1, 70, 0, 1, 20], [37, 15, 21, 4, 0, 0]
    check(make(query_lens, context_lens, 2, heads, dtype))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "has_gate"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)], ids=str
)
def test_long_and_short_contexts_in_splits(
    heads: tuple[int, int, int], dtype: torch.dtype, has_gate: bool
) -> None:
    # Tokens attended to, in splits of 128: five splits and a part, a full one and one token, a full one, two tokens.
    case = make([1] * 4, [700, 128, 127, 1], 4, heads, dtype, has_gate=has_gate)
    launch = AttentionLaunch(decode_programs=64)
    assert launch.splits(4 * heads[1], 701, 959 * heads[1]) == (128, 6)
    check(case, launch)
    assert case.sequences.prefill_tables is None


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_with_the_blocks_of_each_gpu(capability: tuple[int, int]) -> None:
    launch = launch_for(capability, 4, torch.bfloat16, 64)
    check(make([1, 140, 3], [200, 10, 129], 1, (16, 2, 64), torch.bfloat16, has_gate=False), launch)


@pytest.mark.parametrize(("heads", "block_size"), [((3, 1, 16), 1), ((10, 2, 8), 5), ((20, 1, 24), 64)])
def test_odd_groups_heads_and_blocks(heads: tuple[int, int, int], block_size: int) -> None:
    query_lens, context_lens = [1, 33, 66], [42, 9, 0]
    check(make(query_lens, context_lens, 1, heads, torch.float32, block_size=block_size))


def test_more_splits_than_are_put_together_at_once() -> None:
    case = make([1, 1], [2500, 2200], 2, (2, 1, 16), torch.float32)
    # The largest weights are in the last splits of one sequence, in the first of the other.
    case.caches[0, case.tables[0, 128:157].long()] *= 6.0
    case.caches[0, case.tables[1, :20].long()] *= 6.0
    launch = AttentionLaunch(decode_programs=64)
    assert launch.splits(2, 2501, 4702) == (128, 20)
    check(case, launch)


def test_one_token_of_one_sequence() -> None:
    check(make([1], [1], 1, (2, 1, 8), torch.bfloat16))
    check(make([1], [0], 0, (2, 1, 8), torch.bfloat16))


def test_no_tokens() -> None:
    check(make([], [], 0, (2, 1, 8), torch.float32))
    check(make([0, 0], [3, 0], 0, (2, 1, 8), torch.float32))


def test_scores_beyond_exp_of_float32() -> None:
    case = make([1, 20], [300, 30], 1, (2, 1, 32), torch.float32)
    case.q.mul_(100.0)
    check(case, AttentionLaunch(decode_programs=64))
