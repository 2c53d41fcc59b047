"""Packed sequences and tensors for kernel tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_kernels.sequences import PackedSequences

# How far from the float64 formula each dtype may be, relative to the largest value.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def pack(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    num_decodes: int = 0,
    state_checkpoints: Sequence[tuple[int, int, int]] = (),
) -> PackedSequences:
    """Sequences of these lengths; the caller puts decodes first and counts them."""
    return PackedSequences(
        cu_seqlens=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32),
        context_lens_B=torch.tensor(context_lens, dtype=torch.int32),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        num_decodes=num_decodes,
        state_checkpoints=tuple(state_checkpoints),
    )


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(got: torch.Tensor, wanted_f64: torch.Tensor, tolerance: float | None = None) -> None:
    """`got` is finite and within its dtype's tolerance of a float64 result."""
    tolerance = TOLERANCE[got.dtype] if tolerance is None else tolerance
    scale = max(wanted_f64.abs().max().item(), 1e-30) if wanted_f64.numel() else 1.0
    error = (got.double() - wanted_f64).abs().max().item() / scale if wanted_f64.numel() else 0.0
    assert got.shape == wanted_f64.shape
    assert got.isfinite().all()
    assert error <= tolerance, f"relative error {error:.2e}, wanted at most {tolerance:.0e} ({got.dtype})"
