"""What `tests/gpu/test_tables.py` holds a GPU's tiles against, with the tiles of GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

from moe_kernels.aot.occupancy import MULTIPROCESSORS
from moe_kernels.device import DeviceProfile
from moe_kernels.grouped_gemm.launch import GroupedGemmLaunch, choose
from moe_kernels.grouped_gemm.tiles import REGIMES
from moe_kernels.shapes import KernelShapes
from moe_runtime.bench.kernels.experts_reference import experts_float64, relative_error
from moe_runtime.bench.kernels.gpu_experts import make_inputs
from tests.gpu.table_rows import uneven_weights, wrong_rows
from tests.kernels.interpreted.test_grouped_gemm import products_of_float8

SHAPES = KernelShapes(
    hidden_size=160,  # a block of 128 and a part of one
    num_experts=16,
    num_local_experts=4,
    top_k=2,
    moe_intermediate_size=96,
    max_tokens=1100,
)


def launch_of(capability: tuple[int, int], dtype: torch.dtype) -> GroupedGemmLaunch:
    profile = DeviceProfile(
        kind="cuda",
        name="a GPU",
        total_memory=0,
        compute_capability=capability,
        shared_memory_per_block_optin=MULTIPROCESSORS[capability].shared_memory_per_block,
        num_multiprocessors=2,
    )
    return choose(profile, SHAPES, dtype)[0]


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((8, 0), torch.bfloat16),
        ((8, 0), torch.float8_e4m3fn),
        ((9, 0), torch.bfloat16),
        ((9, 0), torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_the_rules_tiles_are_right(capability: tuple[int, int], dtype: torch.dtype) -> None:
    launch = launch_of(capability, dtype)
    assert {REGIMES[launch.bucket(rows).regime] for rows in launch.warm_up_rows()} == set(REGIMES)
    assert wrong_rows(launch, SHAPES, dtype, "cpu") == []


def test_a_wrong_tile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = launch_of((9, 0), torch.bfloat16)
    result = launch.buckets[0].gate_up.block_n * torch.ones(1)
    monkeypatch.setattr("tests.gpu.table_rows.ours", lambda weights, inputs, launch: lambda: result)
    wrong = wrong_rows(launch, SHAPES, torch.bfloat16, "cpu")
    assert len(wrong) == len(launch.warm_up_rows())
    assert wrong[0].startswith(f"1 rows, tiny, {launch.buckets[0].gate_up} and ")


def test_products_of_float8_are_those_of_the_kernels_tests() -> None:
    torch.manual_seed(0)
    weights = uneven_weights(SHAPES, torch.float8_e4m3fn, "cpu")
    inputs = make_inputs(SHAPES, 9, seed=1, device="cpu")
    exact = [
        codes.double()
        * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, : codes.shape[1], : codes.shape[2]]
        for codes, scale in (
            (weights.gate_up_L2FH, weights.gate_up_scale),
            (weights.down_LHF, weights.down_scale),
        )
        if scale is not None
    ]
    by_hand = products_of_float8(inputs.x_GH.double(), inputs.ids_GK, inputs.weights_GK.double(), *exact)
    assert relative_error(experts_float64(weights, inputs, rounds=True), by_hand) < 1e-5
    assert relative_error(experts_float64(weights, inputs, rounds=False), by_hand) > 1e-3
