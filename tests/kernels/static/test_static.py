"""Every Triton kernel at Qwen3-Next-80B's sizes, compiled for GPUs that are not here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

import moe_kernels
from moe_kernels.aot.compile import compile_launch
from moe_kernels.aot.driver import compile_only
from moe_kernels.aot.launches import all_launches, table_launches
from moe_kernels.aot.occupancy import MULTIPROCESSORS, blocks_per_multiprocessor
from moe_kernels.aot.qwen3_next import EXPERT_PARALLEL_SIZES, qwen3_next_80b
from moe_kernels.grouped_gemm import tables
from moe_kernels.grouped_gemm.rule import rows_by_rule
from moe_kernels.grouped_gemm.static import launches_of_rows, profile_of
from moe_kernels.grouped_gemm.tables import TableKey, load_rows, save_rows
from moe_kernels.static_launch import StaticLaunch
from tests.kernels.static.checks import faults_of
from tests.kernels.static.product_kernel import product_launch

H100, B200 = (9, 0), (10, 0)
DTYPES = (torch.bfloat16, torch.float8_e4m3fn)
# Uneven shares of the experts, sizes that no tile divides, many choices, many bytes.
OTHER_SIZES = [
    {"num_local_experts": 171},
    {"head_size": 512},
    {"num_experts": 257, "num_local_experts": 257, "top_k": 32},
    {
        "num_experts": 60,
        "num_local_experts": 60,
        "top_k": 4,
        "moe_intermediate_size": 1408,
        "head_size": 128,
    },
    {
        "num_local_experts": 73,
        "hidden_size": 2056,
        "moe_intermediate_size": 352,
        "head_size": 80,
        "key_size": 96,
        "value_size": 80,
    },
    {
        "num_experts": 256,
        "num_local_experts": 256,
        "top_k": 8,
        "hidden_size": 7168,
        "moe_intermediate_size": 2048,
    },
]


def distinct_launches(capability: tuple[int, int]) -> Iterator[StaticLaunch]:
    """Of every usual expert-parallel size and kind of weight, and of every row of the table; each once."""
    chosen = (
        launch
        for dtype in DTYPES
        for size in EXPERT_PARALLEL_SIZES
        for launch in all_launches(qwen3_next_80b(size), dtype, capability)
    )
    seen = []
    for launch in itertools.chain(chosen, (launch for launch, *_ in table_launches(capability))):
        if launch not in seen:
            seen.append(launch)
            yield launch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_of_an_h100_at_expert_parallel_size_8(dtype: torch.dtype) -> None:
    faults = faults_of(all_launches(qwen3_next_80b(8), dtype, H100), H100)
    assert not faults, "\n".join(faults)


def test_a_row_that_no_plan_reaches_is_compiled_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_folder", lambda: tmp_path)
    rows = rows_by_rule(profile_of(H100), qwen3_next_80b(4), torch.bfloat16)
    large = replace(rows[-1].gate_up, num_stages=9)
    # More rows an expert than there are tokens, and more shared memory than there is.
    unreached = [replace(rows[-1], rows_per_expert=1e6, gate_up=large), rows[-1]]
    save_rows("sm_90", TableKey.of(qwen3_next_80b(4), torch.bfloat16), unreached)
    [launch] = [
        launch
        for launch in distinct_launches(H100)
        if launch.constants.get("L") == 128 and launch.num_stages == 9
    ]
    assert launch.name == "grouped_gemm.gate_up prefill"
    assert [fault for fault in faults_of([launch], H100) if "bytes of shared memory, more than" in fault]


def test_specialised_warps_of_a_b200_break_no_rule() -> None:
    row = load_rows("sm_100", TableKey.of(qwen3_next_80b(8), torch.bfloat16))[-1]
    gate_up, down = (replace(t, warp_specialize=True, programs=1) for t in (row.gate_up, row.down))
    rows = [replace(row, gate_up=gate_up, down=down)]
    products = [
        launch
        for launch in launches_of_rows(rows, qwen3_next_80b(8), torch.bfloat16, B200)
        if launch.constants.get("SPECIALIZE")
    ]
    assert len(products) == 2
    assert faults_of(products, B200) == []
    for launch in products:
        # The warps that bring weights come on top of the tile's own.
        assert compile_launch(launch, B200).num_warps > launch.num_warps


@pytest.mark.slow
@pytest.mark.parametrize("capability", MULTIPROCESSORS, ids="sm_{0[0]}{0[1]}".format)
def test_every_kernel_of_every_architecture(capability: tuple[int, int]) -> None:
    faults = faults_of(distinct_launches(capability), capability)
    assert not faults, "\n".join(dict.fromkeys(faults))


@pytest.mark.slow
@pytest.mark.parametrize("capability", MULTIPROCESSORS, ids="sm_{0[0]}{0[1]}".format)
@pytest.mark.parametrize("sizes", OTHER_SIZES)
def test_sizes_of_other_models_compile_and_fit(sizes: dict[str, int], capability: tuple[int, int]) -> None:
    shapes = replace(qwen3_next_80b(1), **sizes)
    for dtype in DTYPES:
        for launch in all_launches(shapes, dtype, capability):
            code = compile_launch(launch, capability)
            assert code.fits, f"{launch.name} {launch.tile}"
            assert code.blocks, f"{launch.name} {launch.tile}"


def test_every_operation_with_triton_kernels_has_launches() -> None:
    launches = [x for dtype in DTYPES for x in all_launches(qwen3_next_80b(8), dtype, H100)]
    folder = Path(moe_kernels.__file__).parent
    assert {launch.name.partition(".")[0] for launch in launches} == {
        path.parent.name for path in folder.glob("*/triton.py")
    }


# --------------------------------------------------------------------------- the checks can fail


def test_a_good_product_has_no_fault() -> None:
    assert faults_of([product_launch(size=64)], H100) == []


@pytest.mark.parametrize(
    ("launch", "capability", "fault"),
    [
        (product_launch(size=128, num_warps=1), (8, 0), "spills"),
        (product_launch(size=64, depth=512), (8, 9), "bytes of shared memory, more than"),
        (product_launch(size=32), H100, "multiplies with mma.sync, wanted wgmma"),
        (product_launch(size=32), (10, 0), "multiplies with mma.sync, wanted tcgen05"),
        (product_launch(size=32, dtype=torch.float32), (8, 0), "multiplies with None, wanted mma.sync"),
        (replace(product_launch(size=64), bytes_at_once=64), H100, "bytes in flight, wanted 32768"),
        # A few programs on 132 multiprocessors: what one asks for does not make up for those that are idle.
        (
            replace(product_launch(size=64, depth=512), num_programs=16, loop_bytes=1 << 20),
            H100,
            "has 15887 bytes in flight, wanted 32768",
        ),
        (
            replace(product_launch(size=64), num_programs=264, loop_bytes=8192, bytes_at_once=4096),
            H100,
            "has 8192 bytes in flight, wanted 16384",
        ),
        (
            replace(product_launch(size=64, depth=512), persistent_programs=2),
            H100,
            "asks for 2 programs at once, of which 1 can be",
        ),
        # Its loads are not in a loop.
        (
            replace(product_launch(size=64), num_stages=3, bytes_per_stage=64),
            H100,
            "brings weights with plain loads, wanted cp.async",
        ),
    ],
)
def test_a_bad_launch_is_found(launch: StaticLaunch, capability: tuple[int, int], fault: str) -> None:
    faults = faults_of([launch], capability)
    assert any(fault in found for found in faults), faults


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_float8_is_multiplied_as_it_is(capability: tuple[int, int]) -> None:
    launch = product_launch(size=64, depth=128, dtype=torch.float8_e4m3fn)
    assert compile_launch(launch, capability).float8_mma
    assert not [fault for fault in faults_of([launch], capability) if "float8" in fault]


def test_float8_made_wider_is_found() -> None:
    # Below 64 rows there is no wgmma, and Triton has no other float8 product on that GPU.
    launch = replace(product_launch(size=32, depth=128, dtype=torch.float8_e4m3fn), small_mma=True)
    assert "product decode 32x32x128: multiplies float8 as something wider" in faults_of([launch], H100)


def test_a_launch_that_does_not_compile_is_named() -> None:
    faults = faults_of([product_launch(size=64, dtype=torch.float8_e4m3fn)], (8, 0))
    assert len(faults) == 1
    assert faults[0].startswith("product decode 64x64x64 for sm_80 does not compile: ")
    assert "fp8e4nv not supported" in faults[0]


def test_a_tile_that_is_small_on_purpose_is_no_fault() -> None:
    launch = replace(product_launch(size=32), small_mma=True)
    assert faults_of([launch], H100) == []


def test_arguments_that_the_kernel_has_not_are_named() -> None:
    launch = product_launch(size=64)
    arguments = {**launch.arguments, "bias": 1}
    del arguments["w"]
    with pytest.raises(ValueError, match=r"lacks arguments \['w'\] and has no parameters \['bias'\]"):
        compile_launch(replace(launch, arguments=arguments), H100)


def fail_while_compiling_for(capability: tuple[int, int]) -> None:
    with compile_only(capability):
        assert triton.runtime.driver.active.get_current_target().arch == 90
        raise RuntimeError("inside")


def test_the_driver_from_before_is_active_afterwards() -> None:
    before = triton.runtime.driver._active
    with pytest.raises(RuntimeError, match="inside"):
        fail_while_compiling_for(H100)
    assert triton.runtime.driver._active is before


@pytest.mark.parametrize(
    ("capability", "registers", "shared_memory", "num_warps", "blocks"),
    [
        ((8, 0), 72, 36 * 1024, 4, 4),  # shared memory
        ((8, 0), 158, 48 * 1024, 4, 3),  # registers, and shared memory
        ((9, 0), 32, 0, 4, 16),  # warps
        ((9, 0), 168, 112 * 1024, 12, 1),  # registers
        ((8, 9), 16, 0, 1, 24),  # blocks
        ((12, 0), 255, 101376, 8, 1),  # all of the shared memory
    ],
)
def test_programs_on_a_multiprocessor(
    capability: tuple[int, int], registers: int, shared_memory: int, num_warps: int, blocks: int
) -> None:
    assert blocks_per_multiprocessor(capability, registers, shared_memory, num_warps) == blocks
