"""Activations to float8_e4m3fn on the fly: a scale for each token and each 128 columns.

Shape legend: T rows, K columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_kernels.quant import BLOCK


def quantize_activations(
    x_TK: torch.Tensor, num_rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [T, K], float32 scale [T, ceil(K / 128)]); the largest of each block becomes 448.

    Rows from the first element of `num_rows` (int32, on the device) on are left as they are: uninitialised.
    """
    rows, columns = x_TK.shape
    blocks = triton.cdiv(columns, BLOCK)
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x_TK.device)
    scale = torch.empty(rows, blocks, dtype=torch.float32, device=x_TK.device)
    if rows:
        limited = num_rows is not None
        quantize_rows[(rows, blocks)](
            x_TK,
            codes,
            scale,
            num_rows if limited else scale,  # never read
            COLUMNS=columns,
            BLOCK=BLOCK,
            LIMITED=limited,
            num_warps=1,
        )
    return codes, scale


@triton.jit(do_not_specialize_on_alignment=["num_rows"])
def quantize_rows(
    x, codes, scale, num_rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, LIMITED: tl.constexpr
):
    """One program for each (row, block of columns). A block of zeros has codes 0."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if LIMITED:  # noqa: SIM102 (decided when compiled, unlike what it guards)
        if row >= tl.load(num_rows):
            return
    k = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * COLUMNS + k, mask=k < COLUMNS, other=0.0).to(tl.float32)
    factor = tl.maximum(tl.max(tl.abs(value), 0) / 448.0, 1e-30)
    tl.store(codes + row * COLUMNS + k, (value / factor).to(codes.dtype.element_ty), mask=k < COLUMNS)
    tl.store(scale + row * tl.num_programs(1) + block, factor)
