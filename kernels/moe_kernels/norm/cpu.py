"""Norms, SiLU products and rotary positions in native code; other dtypes than float32 and bfloat16 are the
reference's."""

from __future__ import annotations

import torch

from moe_kernels.native.library import native_function
from moe_kernels.norm import reference

_DTYPES = (torch.float32, torch.bfloat16)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool, *, isa: str
) -> torch.Tensor:
    """See `moe_kernels.norm.rms_norm`."""
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return reference.rms_norm(x, weight, eps, zero_centered)
    x = _rows(x)
    out = x.new_empty(x.shape)
    native_function("moe_rms_norm", isa)(
        x.data_ptr(),
        *_strides(x),
        weight.data_ptr(),
        eps,
        1.0 if zero_centered else 0.0,
        out.data_ptr(),
        *_sizes(x),
        torch.get_num_threads(),
    )
    return out


def rms_norm_gated(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, *, isa: str
) -> torch.Tensor:
    """See `moe_kernels.norm.rms_norm_gated`."""
    if x.dtype not in _DTYPES or gate.dtype != x.dtype or weight.dtype != x.dtype:
        return reference.rms_norm_gated(x, gate, weight, eps)
    x, gate = _rows(x), _rows(gate)
    out = x.new_empty(x.shape)
    native_function("moe_rms_norm_gated", isa)(
        x.data_ptr(),
        *_strides(x),
        gate.data_ptr(),
        *_strides(gate)[1:],
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        *_sizes(x),
        torch.get_num_threads(),
    )
    return out


def silu_and_mul(gate_up: torch.Tensor, *, isa: str) -> torch.Tensor:
    """See `moe_kernels.norm.silu_and_mul`."""
    if gate_up.dtype not in _DTYPES or gate_up.dim() != 2 or gate_up.stride(1) != 1:
        return reference.silu_and_mul(gate_up)
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, size)
    native_function("moe_silu_and_mul", isa)(
        gate_up.data_ptr(),
        gate_up.stride(0),
        out.data_ptr(),
        num_rows,
        size,
        gate_up.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


def apply_rotary(
    q_TND: torch.Tensor, k_TMD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, *, isa: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `moe_kernels.norm.apply_rotary`."""
    if q_TND.dtype not in _DTYPES or any(t.dtype != q_TND.dtype for t in (k_TMD, cos_TR, sin_TR)):
        return reference.apply_rotary(q_TND, k_TMD, cos_TR, sin_TR)
    cos_TR, sin_TR = cos_TR.contiguous(), sin_TR.contiguous()
    return _turned(q_TND, cos_TR, sin_TR, isa), _turned(k_TMD, cos_TR, sin_TR, isa)


def _turned(x_TND: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, isa: str) -> torch.Tensor:
    x_TND = _rows(x_TND)
    out = x_TND.new_empty(x_TND.shape)
    native_function("moe_apply_rotary", isa)(
        x_TND.data_ptr(),
        *_strides(x_TND),
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
        cos_TR.shape[1],
        out.data_ptr(),
        *_sizes(x_TND),
        torch.get_num_threads(),
    )
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x if its rows lie whole in at most two dimensions, else a copy."""
    return x if x.dim() in (2, 3) and x.stride(-1) == 1 else x.contiguous()


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Rows that lie side by side, and the strides between groups of these and between them."""
    if x.dim() == 3:
        return x.shape[1], x.stride(0), x.stride(1)
    return 1, x.stride(0) if x.dim() == 2 else x.shape[-1], 0


def _sizes(x: torch.Tensor) -> tuple[int, int, bool]:
    """Rows, values of a row, whether they are bfloat16."""
    size = x.shape[-1]
    return x.numel() // max(size, 1), size, x.dtype == torch.bfloat16
