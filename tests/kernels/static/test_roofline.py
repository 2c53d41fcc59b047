"""Least times by datasheet: known figures for a layer of Qwen3-Next-80B's experts, and counts done by hand."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.aot.launches import all_launches
from moe_kernels.aot.qwen3_next import qwen3_next_80b
from moe_kernels.aot.roofline import PEAKS, Work, peak_of, roofline_seconds
from moe_kernels.aot.work import StepLoad, weight_bytes_of, work_of

H100 = PEAKS[9, 0]


def load(num_tokens: int, ep: int = 1, weights: torch.dtype = torch.bfloat16, context: int = 0) -> StepLoad:
    return StepLoad(
        shapes=qwen3_next_80b(ep),
        num_tokens=num_tokens,
        context=context,
        weight_bytes=weight_bytes_of(weights),
    )


def experts_us(step: StepLoad, dtype: torch.dtype) -> float:
    parts = [work_of(name, step) for name in ("grouped_gemm.gate_up decode", "grouped_gemm.down")]
    return 1e6 * sum(roofline_seconds(work, H100, dtype) for work in parts if work is not None)


@pytest.mark.parametrize(
    ("num_tokens", "active", "bf16_us", "fp8_us"),
    [
        (1, 10, 19, 9.4),
        (32, 240, 451, 226),
        (128, 471, 889, 447),
        (512, 512, 980, 500),
        (4096, 512, 997, 516),
    ],
)
def test_experts_on_one_h100(num_tokens: int, active: float, bf16_us: float, fp8_us: float) -> None:
    assert load(num_tokens).active_experts == pytest.approx(active, rel=0.01)
    assert experts_us(load(num_tokens), torch.bfloat16) == pytest.approx(bf16_us, rel=0.03)
    fp8 = torch.float8_e4m3fn
    assert experts_us(load(num_tokens, weights=fp8), fp8) == pytest.approx(fp8_us, rel=0.05)


def test_a_rank_of_eight_reads_an_eighth_of_the_experts_and_computes_its_own_share() -> None:
    alone, shared = load(4096), load(4096, ep=8)
    assert shared.all_tokens == 8 * 4096
    assert shared.active_experts == pytest.approx(alone.active_experts / 8)
    one, other = (work_of("grouped_gemm.down", step) for step in (alone, shared))
    assert one is not None
    assert other is not None
    assert one.flops == other.flops


def test_a_decode_of_the_delta_rule_moves_its_state_twice() -> None:
    work = work_of("gated_delta.decode", load(3))
    assert work is not None
    state, values = 32 * 128 * 128, 2 * (16 + 32) * 128
    assert work == Work(3 * 7 * state, 3 * (2 * 4 * state + 2 * values))


def test_attention_reads_each_key_and_value_once_for_all_heads() -> None:
    work = work_of("attention.decode", load(2, context=100))
    assert work == Work(2 * 100 * 4 * 16 * 256, 2 * 100 * 2 * 2 * 256 * 2)


def test_the_longer_of_the_two_counts() -> None:
    peak = H100
    assert roofline_seconds(Work(0, 3.35e12), peak, torch.bfloat16) == pytest.approx(1)
    assert roofline_seconds(Work(989.5e12, 1), peak, torch.bfloat16) == pytest.approx(1)
    assert roofline_seconds(Work(989.5e12, 1), peak, torch.float8_e4m3fn) == pytest.approx(0.5)
    a100 = PEAKS[8, 0]
    assert roofline_seconds(Work(312e12, 1), a100, torch.float8_e4m3fn) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "capability", "wanted"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "H100 SXM"),
        ("NVIDIA H200", (9, 0), "H200"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "A100 40GB"),
        ("some other GPU", (7, 5), None),
        ("AMD Instinct MI300X", None, None),
    ],
)
def test_peaks_by_name(name: str, capability: tuple[int, int] | None, wanted: str | None) -> None:
    peak = peak_of(name, capability)
    assert (peak.name if peak else None) == wanted


def test_the_work_of_every_launch_that_moves_much_is_counted() -> None:
    small = ("grouped_gemm.align", "grouped_gemm.sum", "quant.", "attention.reduce")
    names = {launch.name for launch in all_launches(qwen3_next_80b(8), torch.bfloat16, (9, 0))}
    uncounted = [n for n in names if work_of(n, load(8, context=9)) is None and not n.startswith(small)]
    assert uncounted == []
