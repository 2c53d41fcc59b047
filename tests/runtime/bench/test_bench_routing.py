"""`bench routing`: statistics of made-up traces are exact; what ranks record is what transformers chooses."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_runtime import LLM, SamplingParams
from moe_runtime.bench.routing.record import record, recording_args
from moe_runtime.bench.routing.statistics import (
    layer_statistics,
    load_of_experts,
    load_of_ranks,
    overall,
)
from moe_runtime.cli.main import main
from moe_runtime.errors import ConfigError
from moe_runtime.experts.trace import RoutingTrace
from moe_runtime.metrics.balance import tokens_per_expert
from tests.checkpoints import make_checkpoint


def _trace(*layers: list[list[int]], num_experts: int = 8, starts: tuple[int, ...] = (0,)) -> RoutingTrace:
    return RoutingTrace(
        num_experts=num_experts,
        layers=tuple(range(len(layers))),
        choices_TK=tuple(np.array(layer, dtype=np.int16) for layer in layers),
        starts=np.array(starts, dtype=np.int64),
    )


def test_even_choices_have_all_bits_and_no_skew() -> None:
    (layer,) = layer_statistics(_trace([[0, 1], [2, 3], [4, 5], [6, 7]]), [2, 8])
    assert (layer.skew, layer.entropy_bits) == (1.0, 3.0)
    assert layer.experts_for_80_percent == 7  # 6.4 of 8 choices
    assert (layer.overlap, layer.overlap_by_chance) == (0.0, 0.25)
    assert layer.balancedness == {2: 1.0, 8: 1.0}


def test_choices_of_the_same_experts_have_one_bit_and_all_the_skew() -> None:
    (layer,) = layer_statistics(_trace([[0, 1]] * 5), [2, 4])
    assert (layer.skew, layer.entropy_bits) == (4.0, 1.0)
    assert layer.experts_for_80_percent == 2
    assert (layer.overlap, layer.overlap_by_chance) == (1.0, 1.0)
    assert layer.balancedness == {2: 0.5, 4: 0.25}


def test_loads_of_a_half_a_quarter_and_two_eighths_have_1_75_bits() -> None:
    (layer,) = layer_statistics(_trace([[e] for e in (0, 0, 0, 0, 1, 1, 2, 3)], num_experts=4), [2])
    assert layer.entropy_bits == 1.75
    assert layer.skew == 2.0
    assert layer.experts_for_80_percent == 3  # 6.4 of 8
    assert layer.balancedness == {2: pytest.approx(4 / 6)}


def test_exactly_80_percent_needs_no_further_expert() -> None:
    (layer,) = layer_statistics(_trace([[0], [0], [0], [0], [1]], num_experts=2), [])
    assert layer.experts_for_80_percent == 1


def test_tokens_that_begin_a_piece_of_text_follow_nothing() -> None:
    choices = [[0, 1], [1, 0], [0, 2], [5, 6], [6, 7]]
    (whole,) = layer_statistics(_trace(choices), [])
    (pieces,) = layer_statistics(_trace(choices, starts=(0, 3)), [])
    assert whole.overlap == (2 + 1 + 0 + 1) / 8
    assert pieces.overlap == (2 + 1 + 1) / 6
    (alone,) = layer_statistics(_trace([[0, 1]]), [])
    assert np.isnan(alone.overlap)


def test_layers_run_one_after_another_so_their_slowest_ranks_add_up() -> None:
    trace = _trace([[0], [0], [0], [2]], [[3], [3], [3], [0]], num_experts=4)
    assert load_of_ranks(load_of_experts(trace), 2).tolist() == [[3, 1], [1, 3]]
    assert overall(trace, [1, 2]) == {1: 1.0, 2: pytest.approx(4 / 6)}


def test_a_file_gives_back_the_trace(tmp_path: Path) -> None:
    trace = _trace([[0, 1], [2, 3]], [[4, 5], [6, 7]], starts=(0, 1))
    trace.save(tmp_path / "trace")
    with np.load(tmp_path / "trace") as arrays:
        assert arrays["layer_1"].tolist() == [[4, 5], [6, 7]]
        assert arrays["layer_1"].dtype == np.int16
        assert int(arrays["num_experts"]) == 8
    again = RoutingTrace.load(tmp_path / "trace")
    assert (again.num_experts, again.layers, again.starts.tolist()) == (8, (0, 1), [0, 1])
    assert [layer.tolist() for layer in again.choices_TK] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"layer_0": [[0]]}, "it has no array num_experts"),
        ({"num_experts": 4, "layer_0": [[0]], "layer_2": [[0]]}, "it has 2 layers, but no layer_1"),
        (
            {"num_experts": 4, "layer_0": [[4]]},
            "layer_0 must hold whole numbers from 0 to 3, got int64 from 4",
        ),
        (
            {"num_experts": 4, "layer_0": [[0]], "layer_1": [[0, 1]]},
            r"layer_1 must be \[tokens, choices\] as in every layer, got \[1, 2\]",
        ),
    ],
)
def test_a_file_that_holds_no_trace_is_refused(
    arrays: dict[str, object], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "trace.npz", **{name: np.array(value) for name, value in arrays.items()})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        RoutingTrace.load(tmp_path / "trace.npz")


def test_a_trace_of_another_model_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="recorded on 8 experts in 1 MoE layers, 2 a token; the model has 16"
    ):
        _trace([[0, 1]]).check_fits(16, 1, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--replay", "{folder}/none.npz"], "none.npz is no routing trace"),
        (["--replay", __file__], "it is no .npz file of numpy; give one that `bench routing` wrote"),
        (["--text", "{folder}/none.txt"], "none.txt cannot be read"),
        (["--text", "a", "--replay", "b"], "give --text or --replay, not both"),
        (["some/model", "--replay", "b"], "give MODEL or --replay, not both"),
        (["--window-len", "0"], "window_len must be at least 1, got 0"),
        (["--save-trace", "{folder}/none/t.npz"], "none/t.npz: give a file in a directory that exists"),
    ],
)
def test_bad_flags_are_refused_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["bench", "routing", *(flag.format(folder=tmp_path) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_trace_is_looked_at_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _trace([[0, 1]] * 5, [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1]]).save(tmp_path / "trace.npz")
    flags = ["--replay", str(tmp_path / "trace.npz"), "--expert-parallel-sizes", "2,16"]
    assert main(["bench", "routing", *flags, "--plot", str(tmp_path / "figure")]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["benchmark"], report["workload"]["tokens"]) == ("routing", 5)
    assert report["workload"]["max_entropy_bits"] == 3
    assert [(r["layer"], r["skew"], r["balancedness"]) for r in report["results"]] == [
        (0, 4.0, {"2": 0.5}),  # no 16 ranks: there are 8 experts
        (1, 1.6, {"2": 0.8333}),
    ]
    assert (tmp_path / "figure.png").stat().st_size > 0


@torch.inference_mode()
def _reference_choices(model: object, windows: list[list[int]], top_k: int) -> list[torch.Tensor]:
    """Experts of each token by transformers' routers, sorted by id; one [T, K] a layer."""
    of_windows = [
        model(torch.tensor([window]), use_cache=False, output_router_logits=True).router_logits  # type: ignore[operator]
        for window in windows
    ]
    layers = zip(*of_windows, strict=True)
    return [torch.cat(layer).topk(top_k).indices.sort(1).values for layer in layers]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_recorded_choices_are_those_of_transformers_and_replaying_them_gives_their_loads(
    tmp_path: Path,
) -> None:
    reference = make_checkpoint(tmp_path / "model")
    draw = random.Random(5)
    tokens = [draw.randrange(257) for _ in range(50)]
    args = recording_args({"expert_parallel_size": 2, "dtype": "float32", "threads_per_rank": 1})
    with LLM(tmp_path / "model", use_tqdm=False, max_num_batched_tokens=8, max_num_seqs=2, **args) as llm:
        trace = record(llm, tokens, window_len=20)

        before = tokens_per_expert(llm.stats)
        llm.collective_rpc("probe", ("replay_choices", trace.choices_TK))
        prompts = [[1 + n] * 25 for n in range(2)]  # one for each rank, which begin half a trace apart
        llm.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
        llm.collective_rpc("probe", ("settle",))
        replayed = tokens_per_expert(llm.stats) - before

    assert (trace.num_tokens, trace.top_k, trace.num_experts) == (50, 3, 8)
    assert trace.starts.tolist() == [0, 20, 40]
    windows = [tokens[:20], tokens[20:40], tokens[40:]]
    for ours, theirs in zip(trace.choices_TK, _reference_choices(reference, windows, 3), strict=True):
        assert np.sort(ours, axis=1).tolist() == theirs.tolist()
    assert replayed.tolist() == load_of_experts(trace).tolist()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_saved_trace_gives_the_statistics_of_its_recording(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = {name: str(tmp_path / name) for name in ("text", "trace.npz", "result.json")}
    Path(files["text"]).write_text(
        "Every expert of a layer reads some of the words, and none reads all. " * 4
    )
    sizes = ["--expert-parallel-sizes", "2,8"]
    flags = ["--text", files["text"], "--max-tokens", "50", "--window-len", "20", "--threads-per-rank", "1"]
    flags += ["--save-trace", files["trace.npz"], "--save-result", files["result.json"]]

    assert main(["bench", "routing", *flags, *sizes]) == 0
    recorded = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["bench", "routing", "--replay", files["trace.npz"], *sizes]) == 0
    replayed = json.loads(capsys.readouterr().out.splitlines()[-1])

    assert json.loads(Path(files["result.json"]).read_text()) == recorded
    assert RoutingTrace.load(files["trace.npz"]).starts.tolist() == [0, 20, 40]
    assert [result["layer"] for result in recorded["results"]] == [0, 1, 2, 3]
    assert replayed["results"] == recorded["results"]
    for name, value in {"tokens": 50, "experts": 32, "top_k": 4, "max_entropy_bits": 5.0}.items():
        assert replayed["workload"][name] == recorded["workload"][name] == value
    balance = recorded["workload"]["overall_balancedness"]
    assert list(balance) == ["2", "8"]
    assert replayed["workload"]["overall_balancedness"] == balance
