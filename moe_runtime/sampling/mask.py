"""TokenMask: the only tokens that some rows may take, as packed bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True, eq=False)
class TokenMask:
    """Of some rows of the logits; the others may take any token."""

    rows: tuple[int, ...]  # S indices into the logits
    allowed_SW: torch.Tensor  # int32 on the CPU: bit t % 32 of word t // 32 is set where token t may be taken


def apply_mask(x_NV: torch.Tensor, mask: TokenMask) -> None:
    """Set the logits of all other tokens to -inf, in place."""
    vocab = x_NV.shape[1]
    if x_NV.device.type == "cpu":
        bytes_SB = mask.allowed_SW.numpy().view(np.uint8)
        for row, bytes_B in zip(mask.rows, bytes_SB, strict=True):
            allowed_V = np.unpackbits(bytes_B, count=vocab, bitorder="little").view(bool)
            x_NV[row].masked_fill_(~torch.from_numpy(allowed_V), -math.inf)
    else:
        forbid_on_device(x_NV, mask)


def forbid_on_device(x_NV: torch.Tensor, mask: TokenMask) -> None:
    """The same on any device: the packed bits travel, an eighth of a byte a token."""
    vocab, device = x_NV.shape[1], x_NV.device
    words_SW1 = mask.allowed_SW.to(device, non_blocking=True)[:, :, None]
    bits_SV = (words_SW1 >> torch.arange(32, dtype=torch.int32, device=device)).flatten(1)[:, :vocab] & 1
    rows_S = torch.tensor(mask.rows, device=device)
    x_NV[rows_S] = x_NV[rows_S].masked_fill(bits_SV == 0, -math.inf)
