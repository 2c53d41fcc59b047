"""One message a token: its activations, expert ids and routing weights side by side in a row of bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ALIGN = 8  # each part starts at a multiple of 8 bytes, so that it can be viewed in its own dtype


@dataclass(frozen=True, slots=True)
class TokenPacking:
    """Layout of a packed token of hidden size H with K choices.

    Collectives see uint8, which every backend carries for every activation dtype.
    """

    hidden_size: int
    top_k: int
    dtype: torch.dtype

    @property
    def _parts(self) -> tuple[int, int, int, int]:
        """Byte offsets of activations, ids and weights, and the row's length."""
        ids = _aligned(self.hidden_size * self.dtype.itemsize)
        weights = ids + _aligned(self.top_k * 4)
        return 0, ids, weights, weights + _aligned(self.top_k * self.dtype.itemsize)

    @property
    def row_bytes(self) -> int:
        """Bytes of one packed token."""
        return self._parts[3]

    def pack(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """uint8 [rows, row_bytes]; rows past T choose no expert (ids -1)."""
        packed = torch.zeros((rows, self.row_bytes), dtype=torch.uint8, device=x_TH.device)
        x, ids, weights = self.views(packed)
        num_tokens = x_TH.shape[0]
        x[:num_tokens] = x_TH
        ids[:num_tokens] = ids_TK.to(torch.int32)
        ids[num_tokens:] = -1
        weights[:num_tokens] = weights_TK
        return packed

    def views(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of x [R, H], ids [R, K] (int32) and weights [R, K] in a contiguous packed tensor."""
        _, ids_at, weights_at, _ = self._parts
        x = packed.view(self.dtype)[:, : self.hidden_size]
        ids = packed.view(torch.int32)[:, ids_at // 4 : ids_at // 4 + self.top_k]
        start = weights_at // self.dtype.itemsize
        weights = packed.view(self.dtype)[:, start : start + self.top_k]
        return x, ids, weights


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
