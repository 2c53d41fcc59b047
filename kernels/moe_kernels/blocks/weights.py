"""The weights of the layers that are computed in one call; letters as in the package's legend."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Weight(NamedTuple):
    """A linear layer's weight [N, K] in float32, bfloat16 or int8; int8 has a float32 scale for each row."""

    weight_NK: torch.Tensor
    scale_N: torch.Tensor | None = None


class DeltaNetWeights(NamedTuple):
    """Of a Gated DeltaNet layer and the norm before it; see `moe_models.layers.gated_delta_net`."""

    norm_H: torch.Tensor
    in_proj_qkvz: Weight  # rows: q and k of all key heads, v, z of all value heads
    in_proj_ba: Weight  # rows: b of all value heads, a
    conv_CW: torch.Tensor
    a_log_N: torch.Tensor  # float32
    dt_bias_N: torch.Tensor  # float32
    gated_norm_V: torch.Tensor
    out_proj: Weight


class AttentionWeights(NamedTuple):
    """Of a gated attention layer and the norm before it; see `moe_models.layers.attention`."""

    norm_H: torch.Tensor
    in_proj: Weight  # rows: q of all heads, gate of all heads, k, v
    q_norm_D: torch.Tensor
    k_norm_D: torch.Tensor
    out_proj: Weight


class SharedExpertWeights(NamedTuple):
    """Of an expert that every token has."""

    gate_up: Weight  # rows: F of the gate, then F of up
    down: Weight
    gate: Weight  # one row


class ExpertWeights(NamedTuple):
    """Of all E experts of a layer; see `moe_kernels.grouped_gemm`."""

    gate_up_E2FH: torch.Tensor
    down_EHF: torch.Tensor
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None
