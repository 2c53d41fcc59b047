"""`moe-runtime inspect`: the table, the JSON object, and the flags that it refuses."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from moe_runtime.cli import inspect as cli
from moe_runtime.errors import ConfigError
from moe_runtime.inspection import InspectionFacts, ModelInfo, TokenizerFacts

GB = 10**9
INFO = ModelInfo(
    architecture="BigForCausalLM",
    model_class="big:Big",
    modalities=("text",),
    layer_types=("linear_attention",) * 3 + ("full_attention",),
    moe_layers=(0, 1, 2, 3),
    hidden_size=2048,
    vocab_size=1000,
    max_model_len=262_144,
    tie_word_embeddings=False,
    num_experts=48,
    num_experts_per_tok=6,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
    num_mtp_layers=0,
    dtype="bfloat16",
    quantization=None,
    parameters={"expert": 48 * GB, "attention": GB, "linear_attention": GB, "other": GB},
    parameter_bytes={"expert": 96 * GB, "attention": 2 * GB, "linear_attention": 2 * GB, "other": 2 * GB},
    kv_bytes_per_token=24_576,
    state_bytes_per_request=77 * 10**6,
    tokenizer=TokenizerFacts(
        vocab_size=1000, has_chat_template=False, eos_token="<end>", bos_token=None, eos_token_ids=(7,)
    ),
    warnings=("[careful] a warning",),
    inspection=InspectionFacts(node="here", interpreter="/python", seconds=1.5, peak_rss_bytes=3),
)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the command passes to `inspect_model`, which answers INFO."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def answer(*args: Any, **kwargs: Any) -> ModelInfo:
        seen.append((args, kwargs))
        if args[1] is not None:
            INFO.check_ep_size(args[1])
        return INFO

    monkeypatch.setattr(cli, "inspect_model", answer)
    return seen


def _run(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["inspect", "some/model", *flags])
    status: int = args.func(args)
    return status


def test_flags_reach_the_inspection(calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    flags = [
        "--expert-parallel-size",
        "3",
        "--model-class",
        "m:C",
        "--timeout",
        "7",
        "--no-cache",
        "--revision",
        "r",
        "--quantization",
        "int8",
    ]
    assert _run(*flags) == 0
    expected = {"model_class": "m:C", "quantization": "int8", "revision": "r", "use_cache": False}
    assert calls == [(("some/model", 3, 7.0), expected)]


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    _run("--json", "--expert-parallel-size", "3")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    data = json.loads(out)
    assert data["num_parameters"] == 51 * GB
    assert data["active_parameters"] == 9 * GB
    assert data["device_memory"] == 80 * GB
    by_ep = {fit["expert_parallel_size"]: fit for fit in data["fits"]}
    assert list(by_ep) == [1, 2, 3, 4, 8, 16, 32]
    assert by_ep[1]["reason"].endswith("EP 2 or more fits")
    assert by_ep[3]["weight_bytes_per_rank"] == 38 * GB
    assert by_ep[3]["sequences_per_rank"]["4096"] == (72 - 38) * GB // (77 * 10**6 + 24_576 * 4096)
    assert ModelInfo.from_dict({name: data[name] for name in INFO.to_dict()}) == INFO


def test_table_shows_parameters_bytes_and_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    _run("--device-memory", "80GB")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    text = "\n".join(line.rstrip() for line in lines)
    assert "51.00 B, 9.00 B active a token" in text
    assert "expert            48.00 B (96.0 GB)" in text
    assert "4: 1 full_attention, 3 linear_attention; 4 with experts" in text
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert [row[0] for row in cells] == ["1", "2", "4", "8", "16", "32"]
    assert cells[0][1:3] == ["102.0 GB", "does not fit"]
    assert cells[2] == ["4", "30.0 GB", "42.0 GB", "236", "47", "6", "262,144"]
    assert "warning: [careful] a warning" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device-memory", "lots"], "--device-memory must be a number of bytes with a unit"),
        (["--expert-parallel-size", "49"], "more than the 48 experts of BigForCausalLM; use at most 48"),
        (["--expert-parallel-size", "0"], "at least 1, got 0"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _run(*flags)
