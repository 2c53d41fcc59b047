"""Depthwise causal convolution with SiLU over packed sequences, its last inputs carried in a slot.

Shape legend: T tokens, B sequences, C channels, W kernel width.
"""

from __future__ import annotations

import torch

from moe_kernels.implementations import find_implementation
from moe_kernels.sequences import PackedSequences

_TABLE = {
    "reference": "moe_kernels.conv.reference:causal_conv1d",
    "cpu": "moe_kernels.conv.cpu:causal_conv1d",
    "triton": "moe_kernels.conv.triton:causal_conv1d",
}


def causal_conv1d(
    x_TC: torch.Tensor,
    weight_CW: torch.Tensor,
    conv_state: torch.Tensor,
    state_slots_B: torch.Tensor,
    sequences: PackedSequences,
    *,
    implementation: str = "reference",
) -> torch.Tensor:
    """SiLU(conv(x))_TC, in x's dtype, summed in float32 (float64 for float64).

    Each channel has its own W taps, oldest input first. `conv_state` [slots, C, W - 1] holds a sequence's
    last inputs, oldest first, and is updated in place; a sequence without context starts from zeros whatever
    its slot holds, and one of fewer than W - 1 tokens shifts the older inputs. `sequences.state_checkpoints` says
    where the last inputs are kept in other slots as well.
    """
    run = find_implementation("conv", _TABLE, implementation)
    return run(x_TC, weight_CW, conv_state, state_slots_B, sequences)
