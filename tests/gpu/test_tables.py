"""The tiles that a GPU would serve Qwen3-Next-80B with: each gives the reference's result at the model's sizes."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.aot.qwen3_next import qwen3_next_80b
from moe_kernels.device import DeviceProfile
from moe_kernels.grouped_gemm.launch import choose
from tests.gpu.table_rows import wrong_rows

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_every_tile_that_serving_reaches(dtype: torch.dtype) -> None:
    shapes = qwen3_next_80b(8)
    launch, reason = choose(DeviceProfile.query("cuda"), shapes, dtype)
    with torch.inference_mode():
        wrong = wrong_rows(launch, shapes, dtype, "cuda")
    assert not wrong, "\n".join([reason, *wrong])
