"""`bench scaling`: losses add up to what is missing, parts to the time; bad input is refused at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_runtime.bench.report import Report, TextTable
from moe_runtime.bench.scaling.attribution import UNTIMED, PhaseCost, attribute, explain
from moe_runtime.bench.scaling.markdown import markdown
from moe_runtime.bench.scaling.measure import LayoutFacts, Measurements
from moe_runtime.bench.scaling.phases import (
    OUTSIDE,
    PARTS,
    PhaseRate,
    PhaseSample,
    ServedRound,
    TimedRound,
    median_round,
    read_served,
    read_timed,
)
from moe_runtime.bench.scaling.results import make_results
from moe_runtime.bench.scaling.workload import Layout, ScalingWorkload
from moe_runtime.cli.main import main
from moe_runtime.errors import ConfigError
from moe_runtime.experts.trace import RoutingTrace
from moe_runtime.rank_spec import RankStats
from moe_runtime.timing.parts import Part


def _phase(tokens: int, *ranks: dict[str, float]) -> PhaseSample:
    whole = tuple({**dict.fromkeys(PARTS, 0.0), **rank} for rank in ranks)
    return PhaseSample(seconds=sum(whole[0].values()), tokens=tokens, steps=10, ranks=whole)


def _cost(tokens: int, *ranks: dict[str, float], served_s: float | None = None) -> PhaseCost:
    """Served as fast as timed, unless said."""
    timed = _phase(tokens, *ranks)
    served = PhaseRate(seconds=timed.seconds if served_s is None else served_s, tokens=tokens)
    return PhaseCost(num_ranks=len(ranks), served=served, timed=timed)


def test_perfect_scaling_loses_nothing() -> None:
    parts = {"attention": 4.0, "experts": 8.0, "other": 2.0}
    halves = {part: seconds / 2 for part, seconds in parts.items()}
    found = attribute(_cost(100, parts), _cost(100, halves, halves))
    assert (found.speedup, found.efficiency) == (2.0, 1.0)
    assert set(found.loss.values()) == {0.0}
    assert explain(found, 2)[1:] == ["Nothing is lost."]


def test_what_does_not_shrink_and_what_is_new_adds_up_to_what_is_missing() -> None:
    one = _cost(100, {"attention": 4.0, "experts": 8.0, "other": 4.0})
    # Attention halves, experts shrink by a quarter, the rest stays, dispatch and waiting are new.
    two = {"attention": 2.0, "experts": 6.0, "other": 4.0, "dispatch": 1.0, "combine": 1.5, "waiting": 1.5}
    found = attribute(one, _cost(100, two, two))
    assert found.speedup == 1.0
    assert found.efficiency == 0.5
    expected = {
        "attention": 0.0,
        "experts": 2 / 16,
        "dispatch": 1 / 16,
        "combine": 1.5 / 16,
        "waiting": 1.5 / 16,
        "other": 2 / 16,
        "outside": 0.0,
        "untimed": 0.0,
    }
    assert found.loss == pytest.approx(expected)
    assert sum(found.of_groups().values()) == pytest.approx(1 - found.efficiency)
    assert found.shrinkage["experts"] == pytest.approx(8 / 6)
    sentences = explain(found, 2)
    assert sentences[0] == "2 ranks are 1.00 times as fast as 1, of 2 at best: an efficiency of 50%."
    assert sentences[1] == (
        "Of the 50.0 points that are missing go to: dispatch + combine 15.6, other 12.5, experts 12.5, waiting 9.4."
    )
    assert "Experts became 1.33 times as fast, of 2: a rank reads its own experts' weights" in sentences[4]


def test_weak_scaling_is_the_same_with_more_tokens() -> None:
    one, two = {"experts": 8.0}, {"experts": 8.0, "waiting": 2.0}
    found = attribute(_cost(100, one), _cost(200, two, two))
    assert found.speedup == pytest.approx(1.6)
    assert found.efficiency == pytest.approx(0.8)  # T1 / T2
    assert found.loss["experts"] == pytest.approx(0.0)
    assert found.loss["waiting"] == pytest.approx(0.2)


def test_ranks_count_by_their_mean_and_the_baseline_may_have_several() -> None:
    base = _cost(100, {"experts": 6.0, "waiting": 2.0}, {"experts": 8.0})
    four = _cost(100, *[{"experts": 4.0}] * 4)
    found = attribute(base, four)
    assert (found.speedup, found.efficiency) == (2.0, 1.0)
    assert found.loss["experts"] == pytest.approx((4.0 - 7.0 / 2) / 4)
    assert found.loss["waiting"] == pytest.approx(-(1.0 / 2) / 4)
    assert explain(found, 4, 2)[0].startswith("4 ranks are 2.00 times as fast as 2, of 2 at best")


def test_what_only_the_baseline_gains_where_steps_are_not_timed_is_a_loss() -> None:
    one = _cost(100, {"experts": 8.0, "other": 4.0}, served_s=10.0)
    two = _cost(100, *[{"experts": 4.0, "other": 2.0}] * 2, served_s=6.0)
    found = attribute(one, two)
    assert found.speedup == pytest.approx(10 / 6)  # of the served rounds; of the timed ones it is 2
    assert found.loss == pytest.approx({**dict.fromkeys(PARTS, 0.0), UNTIMED: 1 / 6})
    assert found.of_groups()[UNTIMED] == pytest.approx(1 - found.efficiency)
    assert "CPU ranks then compute all layers in one call" in explain(found, 2)[2]


def _stats(rank: int, parts: dict[str, float], of_prompts: dict[str, float], **loop: float) -> RankStats:
    zero = dict.fromkeys((part.label for part in Part), 0.0)
    counters = dict.fromkeys(("steps", "decode_steps", "step_tokens", "decode_tokens", "prompt_tokens"), 0.0)
    return RankStats(
        rank=rank,
        scheduler={},
        loop={**counters, **loop},
        step_parts={**zero, **parts},
        prompt_step_parts={**zero, **of_prompts},
        moe_layers=(0,),
        local_experts=(rank,),
        expert_tokens=((int(loop.get("step_tokens", 0)),),),
        sent_bytes={
            "dispatch": int(loop.get("step_tokens", 0)) * 100,
            "combine": int(loop.get("step_tokens", 0)) * 2,
        },
    )


def test_a_round_is_divided_into_prefill_and_decode_without_a_rest() -> None:
    before = [_stats(rank, {"experts": 1.0}, {"experts": 0.5}) for rank in range(2)]
    after = [
        _stats(
            0,
            {"experts": 6.0, "attention": 1.0, "linear_attention": 1.0},
            {"experts": 2.5, "linear_attention": 1.0},
            steps=5,
            decode_steps=3,
            step_tokens=30,
            decode_tokens=6,
            prompt_tokens=24,
        ),
        _stats(
            1,
            {"experts": 4.0, "waiting": 2.0},
            {"experts": 1.5},
            steps=5,
            decode_steps=3,
            step_tokens=10,
            decode_tokens=3,
            prompt_tokens=7,
        ),
    ]
    sample = read_timed(10.0, 6.0, before, after)
    prefill, decode = sample.phases["prefill"], sample.phases["decode"]
    assert (prefill.tokens, prefill.steps, decode.tokens, decode.steps) == (31, 2, 9, 3)
    assert (prefill.seconds, decode.seconds) == (6.0, 4.0)
    assert decode.ranks[0] == {**dict.fromkeys(PARTS, 0.0), "experts": 3.0, "attention": 1.0}
    assert decode.ranks[1] == {**dict.fromkeys(PARTS, 0.0), "experts": 2.0, "waiting": 2.0}
    assert prefill.ranks[0] == {**dict.fromkeys(PARTS, 0.0), "experts": 2.0, "attention": 1.0, OUTSIDE: 3.0}
    for phase in (prefill, decode):
        assert sum(phase.mean.values()) == pytest.approx(phase.seconds)
    # Of the 3 s outside of steps, those after the last first token are decode's.
    for first_token_s, outside_s in ((9.0, 0.0), (5.5, 0.5), (0.0, 3.0)):
        late = read_timed(10.0, first_token_s, before, after).phases
        assert (late["decode"].seconds, late["prefill"].seconds) == (4.0 + outside_s, 6.0 - outside_s)
        assert late["decode"].ranks[0][OUTSIDE] == outside_s
        assert late["prefill"].ranks[0][OUTSIDE] == 3.0 - outside_s
    assert sample.sent_bytes == {"dispatch": 100.0, "combine": 2.0}
    assert sample.rank_balancedness == pytest.approx(20 / 30)


def _served(output_len: int, **loop: float) -> ServedRound:
    """Of two ranks that did the same, in 10 s, with the last request's first token after 4."""
    before = [_stats(rank, {}, {}) for rank in range(2)]
    return read_served(10.0, 4.0, output_len, before, [_stats(rank, {}, {}, **loop) for rank in range(2)])


def test_a_served_round_is_divided_where_the_last_request_has_its_first_token() -> None:
    phases = _served(4, steps=5, decode_steps=3, decode_tokens=6, prompt_tokens=24).phases
    assert phases == {
        "prefill": PhaseRate(seconds=4.0, tokens=48),
        "decode": PhaseRate(seconds=6.0, tokens=12),
    }
    # Of 6 decode steps 3 ran while others waited for a place: their tokens are not of these seconds.
    phases = _served(4, steps=8, decode_steps=6, decode_tokens=12, prompt_tokens=24).phases
    assert phases["decode"] == PhaseRate(seconds=6.0, tokens=12)
    assert phases["decode"].tokens_per_s == 2.0


def test_a_served_round_of_prompts_alone_is_all_prefill() -> None:
    phases = _served(1, steps=2, prompt_tokens=24).phases
    assert phases == {"prefill": PhaseRate(seconds=10.0, tokens=48)}


@pytest.mark.parametrize(("rounds", "served", "timed"), [(1, 1, 1), (2, 1, 1), (5, 3, 2), (6, 3, 3)])
def test_rounds_are_half_served_and_half_timed(rounds: int, served: int, timed: int) -> None:
    workload = ScalingWorkload(num_rounds=rounds)
    assert (workload.num_served, workload.num_timed) == (served, timed)


def test_the_median_round_is_one_that_took_place() -> None:
    rounds = [
        TimedRound(
            seconds=seconds,
            phases={"decode": _phase(1, {"experts": seconds})},
            sent_bytes={},
            rank_balancedness=None,
            expert_balancedness=None,
        )
        for seconds in (5.0, 1.0, 3.0, 2.0)
    ]
    assert median_round(rounds, "decode").seconds == 2.0
    assert median_round(rounds[:3], "decode").seconds == 3.0


@pytest.mark.parametrize("seconds", [0.0000981, 0.5])
def test_a_phase_too_short_for_the_drivers_clock_is_told_and_keeps_its_digits(
    seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    layout = Layout(num_ranks=1)
    served = ServedRound(seconds=1.0, phases={"prefill": PhaseRate(seconds=seconds, tokens=15)})
    timed = TimedRound(
        seconds=1.0,
        phases={"prefill": _phase(1, {"experts": seconds})},
        sent_bytes={},
        rank_balancedness=None,
        expert_balancedness=None,
    )
    measured = Measurements(
        served={("strong", layout): [served]},
        timed={("strong", layout): [timed]},
        read_speeds={("strong", layout): [None]},
        facts={layout: LayoutFacts(threads=(1,), devices=("cpu",), nodes=("n",), dispatcher="none")},
        model={},
        interleaved=True,
    )
    (result,) = make_results(measured, ScalingWorkload(mode="strong", output_len=1))
    assert result["tokens_per_s"] == pytest.approx(result["tokens"] / result["seconds"], rel=1e-3)
    told = (
        f"strong scaling, EP=1: prefill took {seconds:.2g} s, too short for the driver's clock" in caplog.text
    )
    assert told == (seconds < 0.05)


def test_work_is_fixed_in_all_or_a_rank_and_one_rank_with_all_cores_gets_that_of_many() -> None:
    workload = ScalingWorkload(expert_parallel_sizes=(1, 2, 4), concurrency=8, same_cores=True)
    layouts = workload.layouts(threads=3)
    assert [layout.label for layout in layouts] == [
        "EP=1, 3 threads",
        "EP=2, 3 threads each",
        "EP=4, 3 threads each",
        "EP=1, 6 threads",
        "EP=1, 12 threads",
    ]
    assert [workload.num_requests("strong", layout) for layout in layouts] == [8] * 5
    assert [workload.num_requests("weak", layout) for layout in layouts] == [8, 16, 32, 16, 32]
    assert workload.engine_args(layouts[4], {"threads_per_rank": 3, "dtype": "float32"}) == {
        "max_model_len": 192,
        "dtype": "float32",
        "expert_parallel_size": 1,
        "threads_per_rank": 12,
    }
    assert Layout(num_ranks=2).label == "EP=2"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--expert-parallel-sizes", "2,1"], "whole numbers of at least 1 that grow, got [2, 1]"),
        (["--mode", "strung"], "mode must be one of strong, weak, both, got 'strung'"),
        (["--output-len", "0"], "output_len must be at least 1, got 0"),
        (
            ["--expert-parallel-size", "2"],
            "takes --expert-parallel-sizes N,N,..., not --expert-parallel-size",
        ),
        (["--report", "{folder}/none/r.md"], "none/r.md: give a file in a directory that exists"),
        (["--replay-routing", "{folder}/none.npz"], "none.npz is no routing trace"),
    ],
)
def test_bad_flags_are_refused_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["bench", "scaling", *(flag.format(folder=tmp_path) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_same_cores_needs_threads_to_multiply() -> None:
    with pytest.raises(ConfigError, match="same_cores needs threads_per_rank"):
        ScalingWorkload(same_cores=True).layouts(None)


def test_the_markdown_report_has_words_tables_and_the_environment() -> None:
    result = {
        "mode": "strong",
        "phase": "decode",
        "layout": "EP=2",
        "explanation": ["2 ranks are 1.50 times as fast as 1."],
        "sent_bytes_of_token": {"dispatch": 1234.0, "combine": 56.0},
        "read_gb_per_s_of_rounds": [33.4, 51.0],
        "rank_balancedness": 0.9,
        "expert_balancedness": 0.5,
        "ratio_to_same_cores": 0.95,
    }
    workload = {"model": "m", "dtype": "float32", "interleaved": True}
    workload |= {
        "input_len": 4,
        "output_len": 2,
        "concurrency": 8,
        "num_served_rounds": 3,
        "num_timed_rounds": 2,
    }
    report = Report(
        benchmark="scaling",
        device="a chip",
        started_load=0.5,
        workload=workload,
        results=[{"mode": "strong", "phase": "decode", "layout": "EP=1"}, result],
        tables=[TextTable(title="Throughput", columns=("", "tokens/s"), rows=(("EP=2", "9"),))],
    )
    text = markdown(report, "figures/s.png")
    assert "![Throughput, efficiency and split of a step](figures/s.png)" in text
    assert (
        "**Strong scaling, decode, EP=2.** 2 ranks are 1.50 times as fast as 1. A token sends 1,234 bytes"
        in text
    )
    assert "Before its rounds all ranks together read their weights at 33 to 51 GB/s." in text
    assert "these are 0.95 times as fast." in text
    assert (
        "the median of 3 rounds as they are served. The split of a step: the median of 2 others, with" in text
    )
    assert "## Throughput\n\n|  | tokens/s |\n|---|---:|\n| EP=2 | 9 |\n" in text
    assert "* hardware: device a chip, cpu " in text
    assert text.count("**") == 2


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_two_sizes_of_a_tiny_checkpoint_under_a_recorded_load(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = RoutingTrace(
        num_experts=8,
        layers=(0, 1, 2, 3),
        choices_TK=(np.array([[0, 1], [0, 4]], dtype=np.int16),) * 4,  # a rank of two has three quarters
        starts=np.zeros(1, dtype=np.int64),
    )
    trace.save(tmp_path / "trace.npz")
    flags = ["--random-checkpoint", "tiny", "--threads-per-rank", "1", "--mode", "strong"]
    flags += ["--concurrency", "4", "--input-len", "6", "--output-len", "5", "--num-rounds", "3"]
    flags += ["--replay-routing", str(tmp_path / "trace.npz")]
    files = {name: str(tmp_path / name) for name in ("plot", "report.md", "result.json")}
    flags += ["--plot", files["plot"], "--report", files["report.md"], "--save-result", files["result.json"]]
    assert main(["bench", "scaling", *flags]) == 0

    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(Path(files["result.json"]).read_text()) == report
    workload = report["workload"]
    assert workload["model"] == "tiny"
    assert workload["interleaved"] is True
    assert workload["threads_of_ranks"] == {"EP=1, 1 thread": [1], "EP=2, 1 thread each": [1, 1]}
    results = report["results"]
    assert [(r["phase"], r["expert_parallel_size"]) for r in results] == [
        ("prefill", 1),
        ("prefill", 2),
        ("decode", 1),
        ("decode", 2),
    ]
    for result in results:
        _check_sums(result)
        assert (len(result["round_seconds"]), len(result["timed_round_seconds"])) == (2, 1)
        assert result["expert_balancedness"] == pytest.approx(0.25)  # 1/8 of the choices by 1/2
    for result in results[1::2]:
        # bfloat16: 64 activations, and 2 ids and weights, in each of 4 layers. Of the rows of rank 0 every second
        # has an expert elsewhere, of those of rank 1 each.
        assert result["sent_bytes_of_token"]["dispatch"] == 4 * (64 * 2 + 2 * (4 + 2))
        assert result["sent_bytes_of_token"]["combine"] == pytest.approx(4 * 64 * 2 * 0.75)
        assert result["rank_balancedness"] == pytest.approx(0.5 / 0.75, abs=1e-4)
        assert result["parts_ms_of_step"]["dispatch"] > 0
        assert result["explanation"]
    assert results[0]["tokens"] == 4 * 6
    assert max(results[2]["tokens"], results[2]["timed_tokens"]) <= 4 * 4
    assert all((tmp_path / f"plot.{kind}").stat().st_size > 0 for kind in ("png", "svg"))
    assert "(plot.png)" in Path(files["report.md"]).read_text()


def _check_sums(result: dict[str, Any]) -> None:
    """The parts of every rank are the time of its steps, and the losses are what is missing."""
    assert result["tokens_per_s"] == pytest.approx(result["tokens"] / result["seconds"], rel=1e-3)
    whole_ms = 1e3 * result["timed_seconds"] / result["steps"]
    ranks = result["parts_ms_of_step_of_ranks"]
    assert len(ranks) == result["expert_parallel_size"]
    for parts in (result["parts_ms_of_step"], *ranks):
        assert sum(parts.values()) == pytest.approx(whole_ms, rel=0.01)
        assert min(parts.values()) >= -1e-3
    assert sum(result["loss"].values()) == pytest.approx(1 - result["efficiency"], abs=1e-3)
