"""The experts' products in native code: weights are read where they lie, sums are kept in float32."""

from __future__ import annotations

import torch

from moe_kernels.grouped_gemm import reference
from moe_kernels.native.library import native_function
from moe_kernels.native.signatures import ELEMENT_TYPES


def fused_experts(
    x_GH: torch.Tensor,
    local_ids_GK: torch.Tensor,
    weights_GK: torch.Tensor,
    gate_up_L2FH: torch.Tensor,
    down_LHF: torch.Tensor,
    gate_up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
    *,
    isa: str,
) -> torch.Tensor:
    """See `moe_kernels.grouped_gemm.fused_experts`; float16, float64 and float8 are the reference's.

    A token's result depends neither on the tokens beside it nor on the number of threads.

    Args:
        isa: instruction set, one of `moe_kernels.native.units.LEVELS`.

    Raises:
        NativeBuildError: there is no native library on this machine.
        ValueError: a local id is not that of a local expert, nor -1.
    """
    if x_GH.dtype not in (torch.float32, torch.bfloat16) or gate_up_L2FH.dtype not in ELEMENT_TYPES:
        return reference.fused_experts(
            x_GH, local_ids_GK, weights_GK, gate_up_L2FH, down_LHF, gate_up_scale, down_scale
        )
    x_GH = x_GH if x_GH.stride(1) == 1 else x_GH.contiguous()
    # Kept by name until the call is over, as only their addresses are handed on.
    ids, weights = local_ids_GK.contiguous(), weights_GK.to(x_GH.dtype).contiguous()
    gate_up, down = gate_up_L2FH.contiguous(), down_LHF.contiguous()
    scales = [None if scale is None else scale.contiguous() for scale in (gate_up_scale, down_scale)]
    y_GH = torch.empty_like(x_GH, memory_format=torch.contiguous_format)
    status = native_function("moe_fused_experts", isa)(
        x_GH.data_ptr(),
        x_GH.stride(0),
        ELEMENT_TYPES[x_GH.dtype],
        ids.data_ptr(),
        weights.data_ptr(),
        gate_up.data_ptr(),
        down.data_ptr(),
        ELEMENT_TYPES[gate_up.dtype],
        *(None if scale is None else scale.data_ptr() for scale in scales),
        y_GH.data_ptr(),
        *ids.shape,
        *down.shape,
        torch.get_num_threads(),
    )
    if status == 1:
        raise MemoryError(f"no memory for {ids.numel()} choices of experts of {tuple(down.shape[1:])}")
    if status == 2:
        raise ValueError(f"local ids are {ids.min()} to {ids.max()}; wanted -1 to {down.shape[0] - 1}")
    return y_GH
