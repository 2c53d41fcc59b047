"""Depthwise causal convolution in plain torch: the specification of `causal_conv1d`.

Shape legend: T tokens, B sequences, C channels, W kernel width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from moe_kernels.numerics import accumulation_dtype
from moe_kernels.sequences import PackedSequences


def causal_conv1d(
    x_TC: torch.Tensor,
    weight_CW: torch.Tensor,
    conv_state: torch.Tensor,
    state_slots_B: torch.Tensor,
    sequences: PackedSequences,
) -> torch.Tensor:
    """See `moe_kernels.conv.causal_conv1d`."""
    dtype = accumulation_dtype(x_TC.dtype)
    history = weight_CW.shape[1] - 1
    taps_WC = weight_CW.to(dtype).t()
    out_TC = torch.empty_like(x_TC)

    n = sequences.num_decodes
    if n:
        slots = state_slots_B[:n]
        window_BCW = torch.cat([conv_state[slots], x_TC[:n, :, None].to(conv_state.dtype)], dim=-1)
        out_TC[:n] = _taps(window_BCW.permute(2, 0, 1).to(dtype), taps_WC)
        conv_state[slots] = window_BCW[:, :, 1:]
    for index, tokens, has_context, checkpoints in sequences.prefills():
        slot = state_slots_B[index : index + 1]
        # A new sequence's slot holds whatever was there before.
        before = conv_state[slot][0].t() if has_context else conv_state.new_zeros(history, x_TC.shape[1])
        inputs = torch.cat([before, x_TC[tokens].to(conv_state.dtype)])
        count = inputs.shape[0] - history
        shifted = [inputs[tap : tap + count].to(dtype) for tap in range(history + 1)]
        out_TC[tokens] = _taps(shifted, taps_WC)
        conv_state[slot] = inputs[count:].t()[None]
        for num_tokens, checkpoint_slot in checkpoints:
            conv_state[checkpoint_slot] = inputs[num_tokens : num_tokens + history].t()
    return out_TC


def _taps(inputs: torch.Tensor | list[torch.Tensor], taps_WC: torch.Tensor) -> torch.Tensor:
    """SiLU of the taps' sum, oldest first: one order for decode and prefill."""
    total = inputs[0] * taps_WC[0]
    for tap in range(1, taps_WC.shape[0]):
        total = total + inputs[tap] * taps_WC[tap]
    return F.silu(total)
