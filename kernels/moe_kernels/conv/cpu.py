"""Depthwise causal convolution in native code."""

from __future__ import annotations

import torch

from moe_kernels.conv import reference
from moe_kernels.native.library import native_function
from moe_kernels.sequences import PackedSequences

MAX_WIDTH = 16  # MAX_WIDTH of conv.cpp


def causal_conv1d(
    x_TC: torch.Tensor,
    weight_CW: torch.Tensor,
    conv_state: torch.Tensor,
    state_slots_B: torch.Tensor,
    sequences: PackedSequences,
    *,
    isa: str,
) -> torch.Tensor:
    """See `moe_kernels.conv.causal_conv1d`; other dtypes than float32 and bfloat16 are the reference's."""
    channels, width = weight_CW.shape
    if (
        x_TC.dtype not in (torch.float32, torch.bfloat16)
        or not x_TC.dtype == weight_CW.dtype == conv_state.dtype
        or width > MAX_WIDTH
    ):
        return reference.causal_conv1d(x_TC, weight_CW, conv_state, state_slots_B, sequences)
    assert conv_state.is_contiguous(), "a layer's states lie in one piece"
    x_TC = x_TC if x_TC.stride(1) == 1 else x_TC.contiguous()
    weight_CW, checkpoints = weight_CW.contiguous(), sequences.checkpoints_on_host
    out_TC = x_TC.new_empty(x_TC.shape)
    native_function("moe_causal_conv1d", isa)(
        x_TC.data_ptr(),
        x_TC.stride(0),
        weight_CW.data_ptr(),
        conv_state.data_ptr(),
        state_slots_B.data_ptr(),
        sequences.cu_seqlens.data_ptr(),
        sequences.context_lens_B.data_ptr(),
        out_TC.data_ptr(),
        len(sequences.query_lens),
        checkpoints.data_ptr(),
        checkpoints.shape[0],
        channels,
        width,
        x_TC.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out_TC
