"""Which tiles experts get on which GPU, for how many rows, and where they come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_kernels.aot.occupancy import MULTIPROCESSORS
from moe_kernels.aot.qwen3_next import EXPERT_PARALLEL_SIZES, qwen3_next_80b
from moe_kernels.device import DeviceProfile
from moe_kernels.grouped_gemm import tables
from moe_kernels.grouped_gemm.launch import GroupedGemmLaunch, choose, from_ints, launch_of_rows
from moe_kernels.grouped_gemm.rule import rows_by_rule, tiny_programs
from moe_kernels.grouped_gemm.tables import WEIGHTS, TableKey, load_rows, load_table, save_rows
from moe_kernels.grouped_gemm.tiles import REGIMES, TINY, TileConfig
from moe_kernels.shapes import KernelShapes

DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.float32)
SHAPES = KernelShapes(
    hidden_size=768,
    num_experts=64,
    num_local_experts=8,
    top_k=8,
    moe_intermediate_size=256,
    max_tokens=0,
)


def gpu(capability: tuple[int, int], **fields: int) -> DeviceProfile:
    known = {
        "shared_memory_per_block_optin": MULTIPROCESSORS[capability].shared_memory_per_block,
        "num_multiprocessors": 132,
    }
    return DeviceProfile(
        kind="cuda", name="a GPU", total_memory=1 << 36, compute_capability=capability, **{**known, **fields}
    )


def regime_at(launch: GroupedGemmLaunch, num_rows: int) -> str:
    return REGIMES[launch.bucket(num_rows).regime]


@pytest.mark.parametrize("capability", MULTIPROCESSORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_regimes_follow_the_rows_an_expert(capability: tuple[int, int], dtype: torch.dtype) -> None:
    launch, reason = choose(gpu(capability), SHAPES, dtype)
    # Eight of 64 experts: a row in all is an eighth of a row an expert.
    rows = {"tiny": (1, 8), "decode": (9, 80, 320), "prefill": (321, 10_000, 10**9)}
    for regime, counts in rows.items():
        assert {regime_at(launch, count) for count in counts} == {regime}
    assert "by rule" in reason
    assert all(regime in reason for regime in rows)


@pytest.mark.parametrize(
    ("capability", "swap", "tma", "native_fp8"),
    [
        ((8, 0), False, False, False),
        ((8, 9), False, False, True),
        ((9, 0), True, True, True),
        ((10, 0), True, True, True),
        ((12, 0), False, True, True),
    ],
)
def test_what_an_architecture_can_do_is_used(
    capability: tuple[int, int], swap: bool, tma: bool, native_fp8: bool
) -> None:
    launch, _ = choose(gpu(capability), SHAPES, torch.float8_e4m3fn)
    decode, prefill = launch.bucket(80), launch.bucket(10_000)
    assert (decode.gate_up.swap, prefill.gate_up.tma, launch.native_fp8) == (swap, tma, native_fp8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pipelines_fit_little_shared_memory(dtype: torch.dtype) -> None:
    launch, _ = choose(gpu((8, 0), shared_memory_per_block_optin=49152), SHAPES, dtype)
    for bucket in launch.buckets:
        assert bucket.gate_up.shared_memory(dtype.itemsize, 2, wide_mma=False) <= 49152
        assert bucket.gate_up.num_stages >= 2


def test_a_multiprocessor_gets_as_many_programs_as_its_shared_memory_holds() -> None:
    tile = TileConfig(block_m=64, block_n=128, block_k=64, num_warps=8, num_stages=3, programs=2)
    h100, half = gpu((9, 0)), gpu((9, 0), shared_memory_per_block_optin=101376)
    # Three stages of 64 rows and of 128 or 256 columns: 72 or 120 KB of the 228 KB that there are.
    assert [tile.fitted(512, 2, tiles, h100).programs for tiles in (1, 2)] == [2, 1]
    assert tile.fitted(512, 2, 1, half) == replace(tile, programs=1)
    launch, _ = choose(h100, qwen3_next_80b(8), torch.bfloat16)
    prefill = launch.bucket(8192)
    assert (prefill.gate_up.programs, prefill.down.programs) == (1, 2)


def test_warps_are_specialised_only_where_triton_can() -> None:
    tile = TileConfig(
        block_m=64, block_n=128, block_k=64, num_warps=8, num_stages=3, tma=True, warp_specialize=True
    )
    fitted = {c: tile.fitted(512, 2, 1, gpu(c)).warp_specialize for c in MULTIPROCESSORS}
    assert [capability for capability, special in fitted.items() if special] == [(10, 0)]
    # Nor where weights come without a descriptor.
    assert not tile.fitted(514, 2, 1, gpu((10, 0))).warp_specialize


def test_rows_of_no_multiple_of_16_bytes_are_not_described() -> None:
    odd = replace(SHAPES, hidden_size=770)
    launch, _ = choose(gpu((9, 0)), odd, torch.bfloat16)
    prefill = launch.bucket(10_000)
    assert (prefill.gate_up.tma, prefill.down.tma) == (False, True)


def test_start_up_runs_every_variant_that_can_be_reached() -> None:
    launch, _ = choose(gpu((9, 0)), SHAPES, torch.bfloat16)
    warmed = {launch.bucket(rows) for rows in launch.warm_up_rows()}
    assert {launch.bucket(rows) for rows in range(1, 5000)} == warmed
    few, _ = choose(gpu((9, 0)), replace(SHAPES, max_tokens=60), torch.bfloat16)
    assert max(few.warm_up_rows()) <= 60
    assert [few.bucket(rows).gate_up for rows in (1, 60)] == [launch.bucket(r).gate_up for r in (1, 60)]
    assert regime_at(few, 10_000) == "decode"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("capability", MULTIPROCESSORS)
@pytest.mark.parametrize("size", EXPERT_PARALLEL_SIZES)
def test_few_tokens_leave_few_multiprocessors_idle(
    size: int, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    shapes, count = qwen3_next_80b(size), MULTIPROCESSORS[capability].count
    launch, _ = choose(gpu(capability, num_multiprocessors=count), shapes, dtype)
    widths = []
    for tokens in (1, 2, 3, 4, 8, 16, 56):
        bucket = launch.bucket(tokens)
        assert bucket.regime == TINY
        widths.append((bucket.gate_up.block_n, bucket.down.block_n))
        programs = tiny_programs(tokens, shapes, *widths[-1])
        # Narrower than four columns nothing is; one choice has 128 such programs in gate-up.
        assert min(programs) >= min(count, 128)
    assert widths == sorted(widths)
    assert widths[-1] == (16, 16)


def test_tokens_of_any_number_of_experts_get_their_own_bounds() -> None:
    # Thirds of a row an expert, which no float holds.
    shapes = replace(SHAPES, num_experts=60, num_local_experts=15, top_k=4, moe_intermediate_size=64)
    profile = gpu((9, 0), num_multiprocessors=80)
    launch, _ = choose(profile, shapes, torch.bfloat16)
    found = [launch.bucket(tokens).gate_up.block_n for tokens in range(1, 17)]
    wanted = [next((n for n in (16, 8) if tokens * 64 // n >= 80), 4) for tokens in range(1, 17)]
    # From 1.1 rows an expert on others take over: 16 tokens of 60 experts.
    assert found == wanted


def test_a_launch_goes_through_an_operators_arguments_whole() -> None:
    launch, _ = choose(gpu((9, 0)), SHAPES, torch.float8_e4m3fn)
    for rows in launch.warm_up_rows():
        bucket = launch.bucket(rows)
        assert from_ints(launch.to_ints(rows)) == (bucket.regime, True, 132, bucket.gate_up, bucket.down)


@pytest.mark.parametrize("capability", MULTIPROCESSORS)
def test_the_shipped_tables_have_qwen3_next_80b(capability: tuple[int, int]) -> None:
    for size in EXPERT_PARALLEL_SIZES:
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            _, reason = choose(gpu(capability), qwen3_next_80b(size), dtype)
            assert "from its table" in reason
            rows = load_rows("sm_{}{}".format(*capability), TableKey.of(qwen3_next_80b(size), dtype))
            bounds = [row.rows_per_expert or float("inf") for row in rows]
            assert bounds == sorted(set(bounds))
            assert bounds[-1] == float("inf")


@pytest.mark.parametrize("capability", MULTIPROCESSORS)
def test_every_shipped_row_is_launched_as_it_stands(capability: tuple[int, int]) -> None:
    table = load_table("sm_{}{}".format(*capability))
    assert len(table) >= 2 * len(EXPERT_PARALLEL_SIZES)
    for key, rows in table.items():
        shapes = replace(
            SHAPES,
            num_experts=512,
            num_local_experts=key.local_experts,
            hidden_size=key.hidden_size,
            moe_intermediate_size=key.intermediate_size,
        )
        launch = launch_of_rows(rows, gpu(capability), shapes, WEIGHTS[key.weights])
        launched = [(bucket.gate_up, bucket.down) for bucket in launch.buckets]
        assert launched == [(row.gate_up, row.down) for row in rows]


def test_saved_rows_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_folder", lambda: tmp_path)
    first, second = TableKey.of(SHAPES, torch.bfloat16), TableKey.of(SHAPES, torch.float8_e4m3fn)
    rows = rows_by_rule(gpu((9, 0)), SHAPES, torch.bfloat16)
    save_rows("sm_90", first, rows[1:])
    save_rows("sm_90", second, rows)
    save_rows("sm_90", first, rows)
    assert load_rows("sm_90", first) == load_rows("sm_90", second) == rows
    assert load_rows("sm_90", replace(first, local_experts=9)) == load_rows("sm_80", first) == []
