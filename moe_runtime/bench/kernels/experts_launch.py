"""Launches of the experts' Triton kernels: as chosen for a GPU, or of one row of its table."""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_kernels.device import DeviceProfile
from moe_kernels.grouped_gemm.launch import GroupedGemmLaunch, choose, launch_of_rows
from moe_kernels.grouped_gemm.tables import TableRow
from moe_kernels.shapes import KernelShapes


def chosen_launch(
    profile: DeviceProfile, shapes: KernelShapes, weight_dtype: torch.dtype
) -> GroupedGemmLaunch:
    """What a rank on such a GPU uses."""
    return choose(profile, shapes, weight_dtype)[0]


def launch_of_row(
    row: TableRow, profile: DeviceProfile, shapes: KernelShapes, weight_dtype: torch.dtype
) -> GroupedGemmLaunch:
    """The tiles of `row` for any number of rows, as serving would launch them."""
    return launch_of_rows([replace(row, rows_per_expert=None)], profile, shapes, weight_dtype)
