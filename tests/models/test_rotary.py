"""The angles of rotary positions against their formula in float64."""

from __future__ import annotations

import pytest
import torch

from moe_models.layers.rotary import RotaryTable

ROTARY_DIM, THETA = 16, 10_000.0


def _expected(positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = THETA ** (-torch.arange(0, ROTARY_DIM, 2, dtype=torch.float64) / ROTARY_DIM)
    angles = (torch.tensor(positions, dtype=torch.float64)[:, None] * frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("positions", [[0], [5, 3, 1023], [1024], [7, 1024, 2047], []])
def test_angles_however_the_table_has_grown(positions: list[int]) -> None:
    table = RotaryTable(ROTARY_DIM, THETA)
    for known in ([3], positions, [1500], positions):
        cos, sin = table(torch.tensor(known, dtype=torch.int64), max(known, default=-1) + 1, torch.float32)
        # float32 angles of up to 2,048 radians are off by up to 1.2e-4.
        torch.testing.assert_close(cos.double(), _expected(known)[0], rtol=0, atol=3e-4)
        torch.testing.assert_close(sin.double(), _expected(known)[1], rtol=0, atol=3e-4)


def test_another_dtype_makes_another_table() -> None:
    table = RotaryTable(ROTARY_DIM, THETA)
    positions = torch.tensor([9])
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        cos, sin = table(positions, 10, dtype)
        assert cos.dtype == sin.dtype == dtype
    torch.testing.assert_close(cos.double(), _expected([9])[0], rtol=0, atol=1e-5)
