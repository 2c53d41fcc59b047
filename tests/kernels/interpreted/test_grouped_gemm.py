"""fused_experts in Triton: every regime against the reference in float64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from moe_kernels.grouped_gemm import fused_experts
from moe_kernels.grouped_gemm.align import align
from moe_kernels.grouped_gemm.launch import ONE_PROGRAM_CHOICES, Bucket, GroupedGemmLaunch
from moe_kernels.grouped_gemm.tiles import DECODE, PREFILL, TINY, TileConfig
from moe_kernels.grouped_gemm.weights import widen
from moe_kernels.quant import dequantize, quantize_fp8
from tests.kernels.packing import assert_near

HIDDEN, INTERMEDIATE, TOP_K = 72, 40, 3  # no multiples of the tiles
# Where kernels run that are launched here and not looked up as an operation: see tests/gpu/on_device.py.
DEVICE = os.environ.get("MOE_TEST_DEVICE", "cpu")


def forced(
    regime: int, *, swap: bool = False, tma: bool = False, block_m: int = 16, native_fp8: bool = False
) -> GroupedGemmLaunch:
    tile = TileConfig(block_m=block_m, block_n=32, block_k=32, num_warps=4, num_stages=2, swap=swap, tma=tma)
    bucket = Bucket(max_rows=2**62, regime=regime, gate_up=tile, down=tile)
    # Two multiprocessors: a persistent program has several items.
    return GroupedGemmLaunch(buckets=(bucket,), native_fp8=native_fp8, num_multiprocessors=2)


def of_two_tiles(regime: int, gate_up: TileConfig, down: TileConfig) -> GroupedGemmLaunch:
    bucket = Bucket(max_rows=2**62, regime=regime, gate_up=gate_up, down=down)
    return GroupedGemmLaunch(buckets=(bucket,), num_multiprocessors=2)


def tile(m: int, n: int, k: int, **options: Any) -> TileConfig:
    return TileConfig(block_m=m, block_n=n, block_k=k, num_warps=4, num_stages=3, **options)


LAUNCHES = {
    "tiny": forced(TINY),
    "tiny of few columns": of_two_tiles(TINY, tile(1, 4, 64), tile(1, 8, 16)),
    "decode": forced(DECODE),
    "decode swapped": forced(DECODE, swap=True),
    "prefill": forced(PREFILL, block_m=32),
    "prefill tma": forced(PREFILL, block_m=32, tma=True),
    "prefill swapped tma, of two tiles": of_two_tiles(
        PREFILL, tile(16, 32, 64, swap=True, tma=True), tile(16, 64, 16, tma=True, programs=2)
    ),
    "prefill specialised": of_two_tiles(
        PREFILL, *(tile(32, 64, 32, tma=True, warp_specialize=True) for _ in range(2))
    ),
}


def choices(kind: str, tokens: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    width = max(experts, TOP_K)
    ids = torch.rand(tokens, width, generator=generator).argsort(1)[:, :TOP_K]
    ids = torch.where(ids < experts, ids, -1)
    if kind == "an empty expert":
        return torch.where(ids == 2, -1, ids)
    if kind == "one expert has everything":
        return torch.full((tokens, TOP_K), -1).index_fill_(1, torch.tensor([1]), experts - 1)
    if kind == "all elsewhere":
        return torch.full((tokens, TOP_K), -1)
    return ids


def compare(
    launch: GroupedGemmLaunch, kind: str, tokens: int, experts: int, dtype: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    gate_up = torch.randn(experts, 2 * INTERMEDIATE, HIDDEN, generator=generator).mul(HIDDEN**-0.5).to(dtype)
    down = torch.randn(experts, HIDDEN, INTERMEDIATE, generator=generator).mul(INTERMEDIATE**-0.5).to(dtype)
    ids = choices(kind, tokens, experts)
    weights = torch.rand(tokens, TOP_K, generator=generator).to(dtype)
    weights[ids < 0] = torch.nan
    wanted = fused_experts(x.double(), ids, weights.double(), gate_up.double(), down.double())
    inputs = (tensor.to(device) for tensor in (x, ids, weights, gate_up, down))
    y = fused_experts(*inputs, implementation="triton", launch=launch)
    assert y.dtype == dtype
    assert_near(y.cpu(), wanted)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("spread", torch.float32),
        ("spread", torch.bfloat16),
        ("one expert has everything", torch.bfloat16),
        ("all elsewhere", torch.float32),
        pytest.param("an empty expert", torch.float32, marks=pytest.mark.slow),
        pytest.param("one expert has everything", torch.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=list(LAUNCHES))
def test_equals_the_reference(launch: GroupedGemmLaunch, kind: str, dtype: torch.dtype) -> None:
    # Of the tiny regime's many programs each takes a choice by itself.
    compare(launch, kind, 8 if launch.buckets[0].regime == TINY else 25, 6, dtype, "cpu")


@pytest.mark.parametrize(
    ("tokens", "experts"), [(0, 4), (1, 4), (5, 1), pytest.param(65, 3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=list(LAUNCHES))
def test_any_number_of_rows_and_experts(launch: GroupedGemmLaunch, tokens: int, experts: int) -> None:
    compare(launch, "spread", tokens, experts, torch.float32, "cpu")


def test_a_tokens_result_does_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, HIDDEN, generator=generator)
    gate_up = torch.randn(4, 2 * INTERMEDIATE, HIDDEN, generator=generator)
    down = torch.randn(4, HIDDEN, INTERMEDIATE, generator=generator)
    ids, weights = choices("spread", 11, 4), torch.rand(11, TOP_K, generator=generator)
    for launch in LAUNCHES.values():
        options = {"implementation": "triton", "launch": launch}
        together = fused_experts(x, ids, weights, gate_up, down, **options)
        alone = fused_experts(x[7:9], ids[7:9], weights[7:9], gate_up, down, **options)
        # The interpreter multiplies with NumPy, whose BLAS rounds a row by its place in a tile on some processors.
        rounding = 1e-6 * together.abs().max().item()
        torch.testing.assert_close(together[7:9], alone, rtol=0, atol=rounding)


@pytest.mark.parametrize("num_choices", [1, 500, ONE_PROGRAM_CHOICES + 77])
def test_alignment_gives_each_local_choice_a_row(num_choices: int) -> None:
    experts, block_m = 5, 16
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, experts, (num_choices, 1), generator=generator)
    ids[ids == 3] = -1
    rows = align(ids.to(DEVICE), experts, block_m)
    choices_M, tiles = rows.choices_M.cpu(), rows.tiles.cpu()
    counts = torch.bincount(ids[ids >= 0], minlength=experts)
    starts = counts.cumsum(0) - counts
    *offsets, num_rows, num_tiles = rows.offsets_L.tolist()
    assert offsets == starts.tolist()
    assert num_rows == counts.sum()
    assert sorted(choices_M[:num_rows].tolist()) == (ids[:, 0] >= 0).nonzero()[:, 0].tolist()
    assert ids[choices_M[:num_rows].long(), 0].eq(ids[ids >= 0].sort().values).all()
    wanted = [(e, starts[e] + i) for e in range(experts) for i in range(0, int(counts[e]), block_m)]
    assert num_tiles == len(wanted) <= rows.max_tiles
    assert list(zip(*tiles[:, :num_tiles].tolist(), strict=True)) == wanted


FP8_HIDDEN, FP8_INTERMEDIATE = 160, 128  # a block and a part of one


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Each row's blocks of 128 columns as float8 with a scale."""
    width = x.shape[1]
    blocks = torch.nn.functional.pad(x, (0, -width % 128)).unflatten(1, (-1, 128))
    scale = (blocks.abs().amax(2, keepdim=True) / 448).clamp_min(1e-30)
    codes = (blocks / scale).float().to(torch.float8_e4m3fn)
    return (codes.double() * scale).flatten(1)[:, :width]


def products_of_float8(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The experts in float64 but for the inputs of both products, which are rounded to float8."""
    out = torch.zeros(x.shape[0], down.shape[1], dtype=torch.float64)
    for token, k in (ids >= 0).nonzero().tolist():
        expert = ids[token, k]
        gate, up = (gate_up[expert] @ rounded(x[token : token + 1])[0]).chunk(2)
        h = (torch.nn.functional.silu(gate) * up).to(torch.bfloat16).double()
        out[token] += weights[token, k] * (down[expert] @ rounded(h[None])[0])
    return out


def test_a_tile_deeper_than_a_block_of_scales() -> None:
    # 160 columns of hidden in one step: a block, and a part of the other.
    compare_fp8(of_two_tiles(TINY, tile(1, 8, 256), tile(1, 4, 256)), False, "cpu")


def compare_fp8(launch: GroupedGemmLaunch, products_are_float8: bool, device: str) -> None:
    """Against products of what the codes and scales stand for."""
    generator = torch.Generator().manual_seed(5)
    tokens, experts = 4 if launch.buckets[0].regime == TINY else 11, 3
    x = torch.randn(tokens, FP8_HIDDEN, generator=generator).to(torch.bfloat16)
    x[1] = 0.0
    gate_up = torch.randn(experts, 2 * FP8_INTERMEDIATE, FP8_HIDDEN, generator=generator) * FP8_HIDDEN**-0.5
    down = torch.randn(experts, FP8_HIDDEN, FP8_INTERMEDIATE, generator=generator)
    gate_up[:, :, 128:] *= 8  # so that a block with another's scale shows
    down[:, 128:] *= 8
    (gate_up, gate_up_scale), (down, down_scale) = map(quantize_fp8, (gate_up, down))
    ids = choices("spread", tokens, experts)
    weights = torch.rand(tokens, TOP_K, generator=generator).to(torch.bfloat16)
    exact = (dequantize(gate_up, gate_up_scale, torch.float64), dequantize(down, down_scale, torch.float64))
    by_hand = products_of_float8 if products_are_float8 else fused_experts
    wanted = by_hand(x.double(), ids, weights.double(), *exact)
    tensors = (x, ids, weights, gate_up, down, gate_up_scale, down_scale)
    y = fused_experts(*(tensor.to(device) for tensor in tensors), implementation="triton", launch=launch)
    assert_near(y.cpu(), wanted)


@pytest.mark.parametrize(
    ("regime", "options"),
    [
        (TINY, {"native_fp8": True}),
        (DECODE, {}),
        (DECODE, {"swap": True}),
        (DECODE, {"native_fp8": True}),
        (DECODE, {"native_fp8": True, "swap": True}),
        (PREFILL, {}),
        (PREFILL, {"native_fp8": True, "tma": True}),
    ],
)
def test_float8_weights_with_block_scales(regime: int, options: dict[str, bool]) -> None:
    launch = forced(regime, **options)
    rounds = launch.native_fp8 and regime != TINY
    if rounds and DEVICE != "cpu" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply float8; it takes sm_89 or later")
    compare_fp8(launch, rounds, "cpu")


@triton.jit
def _widen_all(codes, values):
    i = tl.arange(0, 256)
    tl.store(values + i, widen(tl.load(codes + i)))


def test_every_float8_is_widened_exactly() -> None:
    codes, out = torch.arange(256).to(torch.uint8), torch.empty(256, device=DEVICE)
    _widen_all[(1,)](codes.to(DEVICE), out)
    values = out.cpu()
    wanted = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(values[~wanted.isnan()], wanted[~wanted.isnan()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("regime", "swap"), [(TINY, False), (DECODE, False), (DECODE, True), (PREFILL, False)], ids=str
)
def test_weights_of_more_elements_than_32_bits_count(regime: int, swap: bool) -> None:
    experts, hidden, inner = 129, 2056, 8192
    # Of what is not touched no memory is used.
    gate_up = torch.empty(experts, 2 * inner, hidden, dtype=torch.bfloat16)
    down = torch.empty(experts, hidden, inner, dtype=torch.bfloat16)
    assert gate_up[-1].storage_offset() > 2**32
    assert down[-1].storage_offset() > 2**31
    generator = torch.Generator().manual_seed(0)
    gate_up[-1] = torch.randn(2 * inner, hidden, generator=generator) * hidden**-0.5
    down[-1] = torch.randn(hidden, inner, generator=generator) * inner**-0.5
    x = torch.randn(2, hidden, generator=generator).bfloat16()
    tile = TileConfig(block_m=16, block_n=256, block_k=256, num_warps=4, num_stages=2, swap=swap)
    bucket = Bucket(max_rows=2**62, regime=regime, gate_up=tile, down=tile)
    launch = GroupedGemmLaunch(buckets=(bucket,), num_multiprocessors=2)
    ids, weights = torch.full((2, 1), experts - 1), torch.ones(2, 1, dtype=torch.bfloat16)
    y = fused_experts(x, ids, weights, gate_up, down, implementation="triton", launch=launch)
    one = (tensor[-1:].float() for tensor in (gate_up, down))
    assert_near(y, fused_experts(x.float(), torch.zeros_like(ids), weights.float(), *one).double())
