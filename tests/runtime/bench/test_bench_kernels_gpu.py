"""`bench kernels` on a GPU, as far as it can be tested without one: what is compared, the search, the reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from moe_kernels.aot.occupancy import MULTIPROCESSORS
from moe_kernels.aot.roofline import PEAKS
from moe_kernels.device import DeviceProfile
from moe_kernels.grouped_gemm import fused_experts, tables
from moe_kernels.grouped_gemm.rule import rows_by_rule
from moe_kernels.grouped_gemm.tables import TableKey, TableRow, load_rows
from moe_kernels.grouped_gemm.tiles import TileConfig
from moe_runtime.bench.kernels import gpu, gpu_experts, gpu_operations, row_timer, tune
from moe_runtime.bench.kernels.experts_launch import launch_of_row
from moe_runtime.bench.kernels.figure import draw
from moe_runtime.bench.kernels.gpu_experts import (
    ExpertInputs,
    ExpertWeights,
    loop_over_experts,
    make_inputs,
    make_weights,
    torch_grouped_mm,
)
from moe_runtime.bench.kernels.gpu_rates import rate_cells, rates
from moe_runtime.bench.kernels.tile_candidates import sorted_tiles, tiny_tiles
from moe_runtime.errors import ConfigError
from tests.kernels.packing import assert_near
from tests.models.fake_cuda import fake_cuda
from tests.runtime.bench.figures import read_figure
from tests.runtime.bench.kernel_settings import OPERATIONS, SHAPES, small_setting

H100 = DeviceProfile(
    kind="cuda",
    name="NVIDIA H100 80GB HBM3",
    total_memory=80 << 30,
    compute_capability=(9, 0),
    num_multiprocessors=132,
    shared_memory_per_block_optin=232448,
    l2_bytes=1 << 16,
)


def gpu_of(capability: tuple[int, int]) -> DeviceProfile:
    limit = MULTIPROCESSORS[capability].shared_memory_per_block
    return replace(H100, compute_capability=capability, shared_memory_per_block_optin=limit)


@pytest.mark.parametrize("make", [torch_grouped_mm, loop_over_experts], ids=lambda make: make.__name__)
def test_what_is_compared_with_computes_the_same(make: Any) -> None:
    torch.manual_seed(0)
    weights = make_weights(SHAPES, torch.bfloat16, "cpu")
    inputs = make_inputs(SHAPES, 40, seed=1, device="cpu")
    assert sum(inputs.counts_L) == (inputs.ids_GK >= 0).sum()
    wanted = fused_experts(
        inputs.x_GH.double(),
        inputs.ids_GK,
        inputs.weights_GK.double(),
        weights.gate_up_L2FH.double(),
        weights.down_LHF.double(),
    )
    assert_near(make(weights, inputs)(), wanted)


def tile(m: int, n: int, k: int, warps: int, stages: int) -> TileConfig:
    return TileConfig(
        block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages, swap=True, tma=True
    )


SMALL = replace(tile(16, 32, 32, 4, 2), tma=False)


def test_the_search_finds_the_fastest_row() -> None:
    best = {"gate_up": tile(16, 128, 64, 4, 4), "down": tile(16, 64, 128, 8, 3)}

    def measure(row: TableRow) -> float:
        if row.regime != "decode":
            return 9e9
        return 1.0 + sum(
            abs(a - b)
            for part, wanted in best.items()
            for a, b in zip(astuple(getattr(row, part)), astuple(wanted), strict=True)
        )

    row, seconds = tune.search(1.0, H100, torch.bfloat16, measure)
    assert seconds == 1.0
    assert row == TableRow(rows_per_expert=1.0, regime="decode", **best)


def test_the_search_takes_rows_one_by_one_only_where_they_are_few() -> None:
    def tiny_first(row: TableRow) -> float:
        return 1.0 if row.regime == "tiny" else 2.0

    a100 = gpu_of((8, 0))
    regimes = [tune.search(bound, a100, torch.bfloat16, tiny_first)[0].regime for bound in (0.3, 10, None)]
    assert regimes == ["tiny", "decode", "prefill"]


def test_a_found_row_takes_its_place_among_the_others() -> None:
    rows = rows_by_rule(H100, SHAPES, torch.bfloat16)
    again, between = (replace(rows[1], rows_per_expert=bound, source="timed") for bound in (10, 11))
    assert tune.with_row(rows, again) == [rows[0], again, *rows[2:]]
    assert tune.with_row(rows, between) == [*rows[:2], between, *rows[2:]]
    last = replace(rows[-1], source="timed")
    assert tune.with_row(rows, last) == [*rows[:-1], last]


@pytest.mark.parametrize("capability", MULTIPROCESSORS)
@pytest.mark.parametrize("rows_per_expert", [0.05, 4, 40, 320])
def test_tiles_to_try(capability: tuple[int, int], rows_per_expert: float) -> None:
    tiles = list(sorted_tiles(gpu_of(capability), rows_per_expert, 2, 2, persistent=rows_per_expert > 40))
    assert tiles
    assert len(set(tiles)) == len(tiles)
    assert all(tile.block_m <= max(16, 4 * rows_per_expert) for tile in tiles)
    assert {tile.programs for tile in tiles} == ({1, 2} if rows_per_expert > 40 else {1})
    specialised = capability[0] == 10 and rows_per_expert > 40
    assert any(tile.warp_specialize for tile in tiles) == specialised
    assert any(tile.tma for tile in tiles) == (capability >= (9, 0))
    assert any(tile.swap for tile in tiles) == (capability[0] in (9, 10) and rows_per_expert < 256)
    assert all(tile.block_m == 1 for tile in tiny_tiles(gpu_of(capability), 2, 2))


@pytest.mark.parametrize("capability", MULTIPROCESSORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_what_is_timed_is_what_serving_launches(capability: tuple[int, int], dtype: torch.dtype) -> None:
    profile, shapes = gpu_of(capability), gpu.rank_shapes(8)
    for weight_tiles, part in ((2, "gate_up"), (1, "down")):
        tiny = tiny_tiles(profile, dtype.itemsize, weight_tiles)
        sorted_ = sorted_tiles(profile, 80, dtype.itemsize, weight_tiles, persistent=True)
        for tile in (*sorted_, *tiny):
            row = TableRow(rows_per_expert=10, regime="decode", gate_up=SMALL, down=SMALL)
            launch = launch_of_row(replace(row, **{part: tile}), profile, shapes, dtype)
            assert getattr(launch.bucket(1), part) == tile


# --------------------------------------------------------------------------- reports, with the host in the GPU's place


@pytest.fixture
def host_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph of calls takes a millisecond; nothing of ours needs Triton, and all of it is right."""
    monkeypatch.setattr(DeviceProfile, "query", classmethod(lambda cls, device: H100))
    for module in (gpu, row_timer):
        monkeypatch.setattr(module, "make_inputs", partial(make_inputs, device="cpu"))
        monkeypatch.setattr(module, "ours", zeros_later)
        monkeypatch.setattr(module, "capture", run_all)
        monkeypatch.setattr(module, "median_seconds", a_millisecond)
    monkeypatch.setattr(row_timer, "experts_float64", zeros)
    for module in (gpu, tune):
        monkeypatch.setattr(module, "rank_shapes", lambda size: SHAPES)
    for name, stand_in in (("capture", run_all), ("median_seconds", a_millisecond)):
        monkeypatch.setattr(gpu_operations, name, stand_in)
    monkeypatch.setattr(gpu, "gpu_setting", lambda profile: small_setting("reference"))
    monkeypatch.setattr(gpu, "make_weights", partial(gpu_experts.make_weights, device="cpu"))
    monkeypatch.setattr(gpu, "chosen_launch", lambda *_: None)


def zeros(weights: ExpertWeights, inputs: ExpertInputs, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros_like(inputs.x_GH)


def zeros_later(*args: Any, **kwargs: Any) -> Callable[[], torch.Tensor]:
    return partial(zeros, *args, **kwargs)


def run_all(calls: Sequence[Callable[[], object]]) -> list[object]:
    return [call() for call in calls]


def a_millisecond(graphs: Mapping[str, Any], num_rounds: int) -> dict[str, float]:
    return dict.fromkeys(graphs, 1e-3)


@pytest.mark.usefixtures("host_as_gpu")
def test_each_way_of_computing_has_its_rates_and_its_share() -> None:
    report = gpu.run_gpu(8, tokens=(1, 40))
    experts = [r for r in report.results if r["kernel"].startswith("experts")]
    ways = [(r["tokens"], r["weights"], r["implementation"]) for r in experts]
    bf16 = ["moe_runtime", "grouped_mm", "loop"]
    assert ways == [(t, "bfloat16", way) for t in (1, 40) for way in bf16] + [
        (t, "float8_e4m3fn", "moe_runtime") for t in (1, 40)
    ]
    for row in experts:
        seconds = row["us"] / 1e6
        assert row["share"] == pytest.approx(row["roofline_us"] / row["us"], abs=1e-3)
        assert row["tflop_per_s"] <= 6 * 40 * 3 * 64 * 128 / seconds / 1e12 + 0.01
    assert report.tables[0].rows[0][0] == "1 tokens, bfloat16, moe_runtime"
    assert "H100 SXM" in report.tables[0].title


@pytest.mark.usefixtures("host_as_gpu")
def test_each_operation_has_its_roofline_and_torchs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_operations, "median_seconds", torch_takes_thrice_as_long)
    report = gpu.run_gpu(8, tokens=(1,))
    rows = [r for r in report.results if not r["kernel"].startswith("experts")]
    for operation, row in zip(OPERATIONS, rows, strict=True):
        assert row["kernel"].startswith(operation)
        assert row["times_torch"] == 3
        assert row["torch"] == "reference"
        assert row["torch_us"] == pytest.approx(3 * row["us"], abs=0.02)
    assert [row[0] for row in report.tables[1].rows] == [row["kernel"] for row in rows]
    assert report.tables[1].rows[0][-2:] == ("3.00", "reference")


@pytest.mark.usefixtures("host_as_gpu")
def test_what_torch_cannot_capture_is_said_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_delta_prefill(calls: Sequence[Any]) -> list[object]:
        if calls is delta.torch_calls:
            raise RuntimeError("operation not permitted when stream is capturing\nat line 7")
        return run_all(calls)

    cases = gpu_operations.mixer_cases(small_setting("reference"))
    (delta,) = [case for case in cases if case.name.startswith("gated delta prefill")]
    monkeypatch.setattr(gpu_operations, "mixer_cases", lambda setting: cases)
    monkeypatch.setattr(gpu_operations, "capture", refuse_delta_prefill)
    report = gpu.run_gpu(8, tokens=(1,))
    rows = {r["kernel"]: r for r in report.results if not r["kernel"].startswith("experts")}
    assert len(rows) == len(OPERATIONS)
    said = "not run: operation not permitted when stream is capturing"
    refused = rows.pop(delta.name)
    assert (refused["torch"], refused["torch_us"], refused["times_torch"]) == (said, None, None)
    assert refused["us"] > 0
    assert {row["torch"] for row in rows.values()} == {"reference"}
    (cells,) = [row for row in report.tables[1].rows if row[0] == delta.name]
    assert cells[-3:] == ("-", "-", said)


@pytest.mark.usefixtures("host_as_gpu")
def test_the_figure_has_a_bar_for_each_of_ours(tmp_path: Path) -> None:
    report = gpu.run_gpu(8, tokens=(1,))
    draw(report.results, report.device, str(tmp_path / "k"))
    drawn = read_figure(tmp_path / "k")
    assert {row["kernel"] for row in report.results} <= drawn
    assert {"roofline", "% of the limit"} <= drawn


def test_the_figure_says_where_a_gpus_limits_are_not_known(tmp_path: Path) -> None:
    draw([{"kernel": "rotary", "implementation": "moe_runtime", "share": None}], "a GPU", str(tmp_path / "k"))
    assert "a GPU: its limits are not known" in read_figure(tmp_path / "k")


def torch_takes_thrice_as_long(graphs: Mapping[str, Any], num_rounds: int) -> dict[str, float]:
    """A graph's results are as many as its calls, a millisecond each."""
    return {name: len(graph) * (3e-3 if name == "torch" else 1e-3) for name, graph in graphs.items()}


def test_an_operation_at_its_roofline_has_a_share_of_1() -> None:
    (case, *_) = gpu_operations.mixer_cases(small_setting("reference"))
    peak = PEAKS[9, 0]
    # 3 sequences' 4 states of 16 x 8 float32, read and written, and their q, k, v and out in bfloat16.
    num_bytes = 3 * (2 * 4 * 16 * 8 * 4 + 2 * (2 * 16 + 4 * 8) * 2)
    row = rates(num_bytes / 3.35e12, case.work, peak, torch.bfloat16)
    assert (row["share"], row["tb_per_s"]) == (1, 3.35)
    unknown = rates(1e-3, case.work, None, torch.bfloat16)
    assert (unknown["roofline_us"], unknown["share"]) == (None, None)
    assert rate_cells(unknown)[-2:] == ("-", "-")


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_no_case_waits_for_the_gpu_or_mixes_devices(implementation: str) -> None:
    """What a graph cannot capture fails on fake tensors, too."""
    with fake_cuda():
        setting = small_setting(implementation, "cuda")
        cases = [*gpu_operations.mixer_cases(setting), *gpu_operations.token_cases(setting)]
        assert len(cases) == len(OPERATIONS)
        for case in cases:
            for call in case.calls:
                result: Any = call()
                tensors = [result] if isinstance(result, torch.Tensor) else result
                assert {x.device.type for x in tensors} == {"cuda"}, case.name


def test_a_gpus_cases_are_our_own_kernels_beyond_its_cache() -> None:
    setting = gpu_operations.gpu_setting(H100)
    assert setting.plan.attention.implementation == setting.plan.gated_delta.implementation == "triton"
    assert setting.plan.attention.launch is not None
    assert (setting.turns(1000) - 1) * 1000 >= 4 * (1 << 16)


@pytest.mark.usefixtures("host_as_gpu")
def test_what_torch_cannot_capture_is_not_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    a100 = DeviceProfile(
        kind="cuda", name="NVIDIA A100", total_memory=1, compute_capability=(8, 0), num_multiprocessors=108
    )
    monkeypatch.setattr(DeviceProfile, "query", classmethod(lambda cls, device: a100))
    report = gpu.run_gpu(8, tokens=(8,))
    assert "grouped_mm" not in {row["implementation"] for row in report.results}


@pytest.mark.usefixtures("host_as_gpu")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_every_row_that_is_faster_is_written_at_once(
    capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_folder", lambda: tmp_path)
    monkeypatch.setattr(tune, "_BOUNDS", (0.5, None))
    monkeypatch.setattr(DeviceProfile, "query", classmethod(lambda cls, device: gpu_of(capability)))
    # What the rule has takes longer than all else.
    present = {dtype: rows_by_rule(gpu_of(capability), SHAPES, dtype) for dtype in tune._DTYPES.values()}
    slow = {(row.gate_up, row.down) for rows in present.values() for row in rows}
    monkeypatch.setattr(
        row_timer.RowTimer, "__call__", lambda self, row: 2.0 if (row.gate_up, row.down) in slow else 1.0
    )
    report = tune.run_tune(8, num_rounds=1)
    for dtype, rule in present.items():
        rows = load_rows("sm_{}{}".format(*capability), TableKey.of(SHAPES, dtype))
        timed = [row for row in rows if row.source == f"timed on {H100.name}"]
        assert [row.rows_per_expert for row in timed] == [0.5, None]
        # The rule's rows stay where nothing was measured: a search that was interrupted leaves a whole table.
        assert [row for row in rows if row not in timed] == rule[:-1]
    assert len(report.results) == len(report.tables[0].rows) == 4
    assert {(r["us"], r["present_us"], r["written"]) for r in report.results} == {(1e6, 2e6, True)}


@pytest.mark.usefixtures("host_as_gpu")
def test_a_row_that_is_no_faster_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_folder", lambda: tmp_path)
    monkeypatch.setattr(tune, "_BOUNDS", (20,))
    report = tune.run_tune(8, num_rounds=1)
    assert [r["written"] for r in report.results] == [False, False]
    assert {r["us"] for r in report.results} == {r["present_us"] for r in report.results}
    assert list(tmp_path.iterdir()) == []


def test_the_row_that_serves_a_bound() -> None:
    rows = rows_by_rule(H100, SHAPES, torch.bfloat16)
    bounds = [row.rows_per_expert for row in rows]
    assert [tune.row_for(rows, bound) for bound in bounds] == rows
    assert tune.row_for(rows, 2) == rows[1]


# --------------------------------------------------------------------------- what cannot be timed


def refuse(error: Exception) -> Callable[..., Callable[[], torch.Tensor]]:
    def call() -> torch.Tensor:
        raise error

    return lambda *_: call


def timer() -> row_timer.RowTimer:
    layers = [make_weights(SHAPES, torch.bfloat16, "cpu")]
    return row_timer.RowTimer(H100, SHAPES, torch.bfloat16, layers, num_tokens=4, num_rounds=1)


ROW = TableRow(rows_per_expert=1.0, regime="decode", gate_up=SMALL, down=SMALL)


@pytest.mark.usefixtures("host_as_gpu")
@pytest.mark.parametrize(
    ("error", "note"),
    [
        (OutOfResources(300_000, 232_448, "shared memory"), "out of resource: shared memory"),
        (PTXASError("ptxas was not pleased"), "ptxas was not pleased"),
        (CompilationError("src", None, "no such tile"), "no such tile"),
        (RuntimeError("PassManager::run failed"), "PassManager::run failed"),
    ],
)
def test_what_does_not_run_is_discarded_with_a_note(
    error: Exception, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_timer, "ours", refuse(error))
    time = timer()
    assert time(ROW) == float("inf")
    assert len(time.discarded) == 1
    assert time.discarded[0].startswith("decode 16x32x32 swapped and 16x32x32 swapped: ")
    assert note in time.discarded[0]


@pytest.mark.usefixtures("host_as_gpu")
def test_a_gpu_that_is_lost_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    monkeypatch.setattr(row_timer, "ours", refuse(lost))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        timer()(ROW)


@pytest.mark.usefixtures("host_as_gpu")
@pytest.mark.parametrize("error", [0.03, float("nan")])
def test_a_wrong_result_is_refused(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def nearly(weights: ExpertWeights, inputs: ExpertInputs, launch: Any) -> Callable[[], torch.Tensor]:
        return lambda: torch.ones_like(inputs.x_GH).index_fill_(1, torch.tensor([3]), 1 + error)

    wanted = lambda weights, inputs, rounds: torch.ones_like(inputs.x_GH, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(row_timer, "experts_float64", wanted)
    monkeypatch.setattr(row_timer, "ours", nearly)
    time = timer()
    assert time(ROW) == float("inf")
    assert "relative error" in time.discarded[0]
    assert "wanted at most 2e-02" in time.discarded[0]


def test_each_block_of_weights_has_a_scale_of_its_own() -> None:
    layer = make_weights(replace(SHAPES, hidden_size=256), torch.float8_e4m3fn, "cpu")
    tune.make_scales_uneven([layer])
    for scale in (layer.gate_up_scale, layer.down_scale):
        assert scale is not None
        assert scale.unique().numel() == scale.numel() > 1


@pytest.mark.usefixtures("host_as_gpu")
def test_tuning_an_unknown_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    t4 = DeviceProfile(kind="cuda", name="Tesla T4", total_memory=1, compute_capability=(7, 5))
    monkeypatch.setattr(DeviceProfile, "query", classmethod(lambda cls, device: t4))
    with pytest.raises(ConfigError, match="no tile tables for Tesla T4"):
        tune.run_tune(8)


def test_experts_that_cannot_be_shared_evenly_are_refused() -> None:
    with pytest.raises(ConfigError, match="--expert-parallel-size is 7; wanted a divisor of 512"):
        gpu.rank_shapes(7)
