"""`bench compare`: turns and their order, rates and ratios, a peer's crash, bad flags, and transformers for real."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from moe_runtime.bench import compare_rates
from moe_runtime.bench.peers import catalog
from moe_runtime.bench.turns import Shape, Turn, take_turns
from moe_runtime.cli.main import main
from moe_runtime.errors import BenchmarkPeerError

_DECODE = Shape(kind="decode", num_requests=2, input_len=4, output_len=6)
_TINY = ["bench", "compare", "--random-checkpoint", "tiny", "--threads", "1", "--num-rounds", "2"]
_TINY += ["--input-len", "6", "--output-len", "5", "--dtype", "float32"]


class _FakeSystem:
    """Keeps what it was asked for in `log`, which several share; fails at its batch number `fails_at`."""

    def __init__(self, name: str, log: list[tuple[str, str]], fails_at: int | None = None) -> None:
        self.name, self._log, self._fails_at = name, log, fails_at
        self.batches: list[Sequence[list[int]]] = []

    def generate(self, prompts: Sequence[list[int]], output_len: int) -> Turn:
        if len(self.batches) == self._fails_at:
            raise BenchmarkPeerError(f"{self.name} failed")
        self.batches.append(prompts)
        self._log.append((self.name, "generate"))
        return Turn(tokens=[[0] * output_len for _ in prompts], seconds=1.0)

    def warm_up(self, prompts: Sequence[list[int]], output_len: int) -> None:
        self._log.append((self.name, "warm up"))

    def pause(self) -> None:
        self._log.append((self.name, "pause"))

    def resume(self) -> None:
        self._log.append((self.name, "resume"))


def _take_turns(systems: list[_FakeSystem], failures: list[str]) -> dict[str, list[Turn]]:
    return take_turns(
        systems,
        _DECODE,
        num_rounds=3,
        vocab_size=9,
        seed=0,
        on_failure=lambda system, error: failures.append(f"{system.name}: {error}"),
    )


def test_rounds_alternate_their_order_and_nobody_runs_in_anothers_turn() -> None:
    log: list[tuple[str, str]] = []
    systems = [_FakeSystem(name, log) for name in "abc"]
    turns = _take_turns(systems, [])
    assert [name for name, what in log if what == "generate"] == list("abccbaabc")
    assert [what for _, what in log[:9]] == ["resume", "warm up", "pause"] * 3
    assert [what for _, what in log[9:]] == ["resume", "generate", "pause"] * 9
    assert all(log[i][0] == log[i + 1][0] == log[i + 2][0] for i in range(0, len(log), 3))
    assert {name: len(own) for name, own in turns.items()} == {"a": 3, "b": 3, "c": 3}


def test_all_get_the_same_new_prompts_in_a_round() -> None:
    systems = [_FakeSystem(name, []) for name in "ab"]
    _take_turns(systems, [])
    assert systems[0].batches == systems[1].batches
    first, second, _ = systems[0].batches
    assert first != second
    assert [len(prompt) for prompt in first] == [4, 4]


def test_a_system_that_fails_is_reported_once_and_the_others_go_on() -> None:
    failures: list[str] = []
    systems = [_FakeSystem("a", []), _FakeSystem("b", [], fails_at=1), _FakeSystem("c", [])]
    turns = _take_turns(systems, failures)
    assert failures == ["b: b failed"]
    assert {name: len(own) for name, own in turns.items()} == {"a": 3, "c": 3}


def _turns(seconds: Sequence[float], first: float | None = 0.5, token: int = 0) -> list[Turn]:
    return [
        Turn(tokens=[[token] * 6] * 2, seconds=s, first_token_seconds=first, decode_tokens=10)
        for s in seconds
    ]


@pytest.mark.parametrize("seconds", [0.51, 0.6])
def test_a_decode_too_short_for_the_drivers_clock_is_told(
    seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    compare_rates.rates_of(_DECODE, {"ours": _turns([1.0, 1.0]), "x": _turns([1.0, seconds])})
    short = ["x, 2 requests, 4 in, 6 out: decode took 0.01 s, too short for the driver's clock"]
    assert [message.split(", so")[0] for message in caplog.messages] == (short if seconds < 0.55 else [])


def test_ratios_are_medians_of_the_rounds_ratios() -> None:
    turns = {"ours": _turns([1.0, 2.0, 4.0]), "x": _turns([2.0, 2.0, 16.0]), "y": _turns([8.0] * 3, token=1)}
    whole, decode = compare_rates.rates_of(_DECODE, turns)
    assert whole.by_round["ours"] == (12.0, 6.0, 3.0)
    assert whole.ratios == {"x": 2.0, "y": 4.0}
    assert whole.best_peer == "x"
    assert whole.spread == {"ours": 4.0, "x": 8.0, "y": 1.0}
    assert whole.equal_outputs == {"x": 1.0, "y": 0.0}
    assert decode.metric == "decode tokens/s"
    assert decode.medians["ours"] == pytest.approx(10 / 1.5)

    table = compare_rates.rates_table([whole])
    assert table.columns == (
        "workload",
        "rate",
        "ours",
        "x",
        "y",
        "best peer",
        "ours / best",
        "slowest/fastest",
    )
    assert table.rows == (
        ("2 requests, 4 in, 6 out", "output tokens/s", "6.0", "6.0", "1.5", "x", "2.00", "8.00"),
    )
    ratios = compare_rates.ratio_table([whole], frozenset({"y"}))
    assert ratios.columns == ("workload", "rate", "/ x", "/ y", "equal to y")
    assert ratios.rows == (("2 requests, 4 in, 6 out", "output tokens/s", "2.00", "4.00", "0%"),)


def test_decode_alone_is_left_out_where_one_system_cannot_say_it() -> None:
    turns = {"ours": _turns([1.0]), "x": _turns([2.0], first=None)}
    assert [row.metric for row in compare_rates.rates_of(_DECODE, turns)] == [
        "output tokens/s, prefill included"
    ]


def test_a_prefill_counts_the_tokens_of_the_prompt() -> None:
    shape = Shape(kind="prefill", num_requests=1, input_len=512, output_len=1)
    (row,) = compare_rates.rates_of(shape, {"ours": _turns([2.0])})
    assert (row.metric, row.medians, row.best_peer) == ("prompt tokens/s", {"ours": 256.0}, None)
    assert compare_rates.rates_table([row]).rows[0][-3:] == ("-", "-", "1.00")
    assert compare_rates.ratio_table([row], frozenset()).rows == ()


def test_the_figure_has_bars_for_everyone(tmp_path: Path) -> None:
    rows = compare_rates.rates_of(_DECODE, {"ours": _turns([1.0]), "x": _turns([2.0])})
    prefill = Shape(kind="prefill", num_requests=1, input_len=512, output_len=1)
    rows += compare_rates.rates_of(prefill, {"ours": _turns([1.0])})  # x failed before this one
    facts = {"model": "small", "our_weights": "bfloat16", "threads": 2}
    compare_rates.draw([row.to_dict() for row in rows], facts, str(tmp_path / "figure"))
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert "</svg>" in (tmp_path / "figure.svg").read_text()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_the_tiny_checkpoint_has_transformers_tokens(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--concurrency", "1,3", "--prefill-len", "20", "--peers", "transformers"]
    saved = tmp_path / "result.json"
    assert main([*_TINY, *flags, "--save-result", str(saved), "--plot", str(tmp_path / "figure")]) == 0

    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(saved.read_text()) == report
    assert (tmp_path / "figure.svg").exists()
    shapes = [(r["workload"], r["requests"], r["input_len"], r["metric"]) for r in report["results"]]
    assert shapes == [
        ("decode", 1, 6, "output tokens/s, prefill included"),
        ("decode", 1, 6, "decode tokens/s"),
        ("decode", 3, 6, "output tokens/s, prefill included"),
        ("decode", 3, 6, "decode tokens/s"),
        ("prefill", 1, 20, "prompt tokens/s"),
    ]
    for result in report["results"]:
        assert list(result["systems"]) == ["moe_runtime", "transformers:float32"]
        assert all(len(system["rounds"]) == 2 for system in result["systems"].values())
        assert result["ratios"]["transformers:float32"] > 0
        assert result["equal_outputs"] == {"transformers:float32": 1.0}
    assert report["peers"]["transformers:float32"]["settings"]["experts"] == "grouped_mm"
    assert (report["not_measured"], report["failed"]) == ({}, {})


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_peer_that_crashes_is_named_and_makes_the_exit_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = catalog.Kind(
        file=str(Path(__file__).with_name("fake_peer")),
        module="json",
        reads_gguf=False,
        variants=("ok", "dies"),
        float32=None,
        install="",
    )
    monkeypatch.setattr(catalog, "KINDS", {"fake": fake})
    flags = ["--concurrency", "2", "--prefill-len", "8", "--peers", "fake:dies,fake", "--no-tune"]
    assert main([*_TINY, *flags]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    why = "fake:dies ended with status -6: ggml_abort: cells (in 2 requests, 6 in, 5 out)"
    assert report["failed"] == {"fake:dies": why}
    assert [list(result["systems"]) for result in report["results"]] == [["moe_runtime", "fake:ok"]] * 3
    assert report["results"][0]["systems"]["fake:ok"]["details"] == {"tuned": False, "number": 3}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.skipif(
    "TEST_LLAMA_CPP_PYTHON" not in os.environ or "TEST_LLAMA_CPP_CONVERTER" not in os.environ,
    reason="needs TEST_LLAMA_CPP_PYTHON, a Python with llama-cpp-python, and TEST_LLAMA_CPP_CONVERTER, the path of "
    "llama.cpp's convert_hf_to_gguf.py",
)
def test_the_tiny_checkpoint_has_llama_cpps_tokens_in_float32(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--concurrency", "1,3", "--prefill-len", "20", "--peers", "llama.cpp:f32,llama.cpp:q8_0"]
    flags += ["--peer-python", f"llama.cpp={os.environ['TEST_LLAMA_CPP_PYTHON']}"]
    flags += ["--llama-cpp-converter", os.environ["TEST_LLAMA_CPP_CONVERTER"], "--gguf-cache", str(tmp_path)]
    assert main([*_TINY, *flags]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    for result in report["results"]:
        assert result["equal_outputs"]["llama.cpp:f32"] == 1.0
        assert result["systems"]["llama.cpp:q8_0"]["tokens_per_s"] > 0
        assert 0 <= result["systems"]["llama.cpp:f32"]["details"]["sampling_share"] < 1
    assert len(list(tmp_path.glob("tiny-*.gguf"))) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peers", "llamacpp"], "there is no peer 'llamacpp'; wanted one of transformers, vllm, llama.cpp"),
        (["--peers", "llama.cpp:q9"], "llama.cpp has no variant 'q9'; wanted one of f16, bf16, q8_0, f32"),
        (["--peers", "transformers,transformers:float32"], "--peers names transformers:float32 twice"),
        (["--peer-python", "vlm=python"], "--peer-python vlm=python: wanted PEER=PATH with one of"),
        (["--peer-python", "vllm=/no/such/python"], "--peer-python vllm=/no/such/python: "),
        (
            ["--llama-cpp-converter", "/no/file.py"],
            "--llama-cpp-converter /no/file.py: there is no such file",
        ),
        (
            ["--gguf-cache", "/no/such/place"],
            "--gguf-cache /no/such/place: give a directory in one that exists",
        ),
        (["--threads-per-rank", "2"], "--threads-per-rank follows from --threads"),
        (["--threads", "3", "--expert-parallel-size", "2"], "--threads 3 does not divide over 2 ranks"),
        (["--concurrency", "8,0"], "concurrency must be whole numbers of at least 1, got [8, 0]"),
        (["--prefill-len", "512,512"], "prefill_len has a number twice: [512, 512]"),
        (["--concurrency", "none", "--prefill-len", "none"], "nothing to measure"),
        (["--num-rounds", "0"], "num_rounds must be at least 1, got 0"),
        (["--peer-timeout-s", "0"], "peer_timeout_s must be above 0, got 0"),
        (["some/model", "--random-checkpoint", "tiny"], "give MODEL or --random-checkpoint, not both"),
        (["--plot", "/no/such/place/figure"], "--plot /no/such/place/figure: give a prefix in a directory"),
    ],
)
def test_bad_flags_are_refused_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "compare", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
