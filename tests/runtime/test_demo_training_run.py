"""A whole run of the demo checkpoint's script, on a model of a few thousand parameters and a text made here."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3NextConfig

import train_demo_checkpoint
from demo_training import card, data, model, sources, tokenizer, training
from moe_runtime.modelfiles import resolve_model
from moe_runtime.tokenizer import load_tokenizer

VOCAB, LENGTH, SEQUENCES, STEPS = 320, 64, 2, 7
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
PACKAGE = {"package": "made", "version": "1", "text": "numbers", "licence": "none", "sha256": "ab" * 32}
SHAPE = {**model.model_config().to_dict(), **SMALL}


def _domains(directory: Path, seed: int) -> dict[str, list[str]]:
    """Enough units of each domain for one block to be held out."""
    return {name: [f"In {name} {n} is {n * n}.\n" for n in range(1000)] for name in data.SHARES}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the script has run: `out` is the checkpoint, `log` what it printed."""
    directory = tmp_path_factory.mktemp("work")
    argv = [
        "--work",
        str(directory),
        "--out",
        str(directory / "out"),
        "--steps",
        str(STEPS),
        "--threads",
        "1",
    ]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, (directory / "log").open("w") as log:
        for module in (training, card):
            patch.setattr(module, "SEQUENCES", SEQUENCES)
            patch.setattr(module, "LENGTH", LENGTH)
        patch.setattr(training, "VALIDATION_STEPS", 3)
        patch.setattr(tokenizer, "VOCAB_SIZE", VOCAB)
        patch.setattr(model, "model_config", lambda: Qwen3NextConfig(**SHAPE))
        patch.setattr(data, "domains", _domains)
        patch.setattr(sources, "fetch", lambda directory, allow_other: None)
        patch.setattr(sources, "provenance", lambda directory: [PACKAGE])
        patch.setattr(sys, "argv", ["train_demo_checkpoint.py", *argv])
        patch.setattr(sys, "stdout", log)
        train_demo_checkpoint.main()
    yield directory
    torch.set_num_threads(threads)


def _rows(text: str, first: str) -> list[list[str]]:
    """The rows of the card's table whose header begins with `first`, the header included."""
    table = text[text.index(f"| {first} |") :].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]


def test_transformers_loads_what_was_trained(work: Path) -> None:
    loaded, report = AutoModelForCausalLM.from_pretrained(work / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    trained = torch.load(work / "state.pt")["model"]
    weights = loaded.state_dict()
    assert set(weights) == set(trained)
    for name, weight in weights.items():
        assert torch.equal(weight, trained[name].bfloat16()), name


def test_the_tokenizer_and_the_template_are_the_runs(work: Path) -> None:
    read = load_tokenizer(resolve_model(str(work / "out")))
    text = "In novels 12 is 144.\n"
    assert read.decode(read.encode(text)) == text
    assert (work / "out" / "chat_template.jinja").read_text() == tokenizer.CHAT_TEMPLATE
    assert (work / "out" / "tokenizer.json").read_bytes() == (work / "tokenizer.json").read_bytes()


def test_the_card_has_the_loss_curve_that_the_run_printed(work: Path) -> None:
    lines = [json.loads(line) for line in (work / "log").read_text().splitlines() if line.startswith("{")]
    points: list[dict[str, Any]] = [line for line in lines if "train" in line]
    assert [point["step"] for point in points] == [3, 6, STEPS]
    header, _, *rows, last = _rows((work / "out" / "README.md").read_text(), "step")
    assert header == ["step", "train", *data.SHARES]
    assert rows == [
        [str(point["step"]), *(f"{point[name]:.2f}" for name in ("train", *data.SHARES))] for point in points
    ]
    _, held_out = torch.load(work / "tokens.pt", weights_only=False)
    bits = {name: points[-1][name] / math.log(2) * len(t.ids) / t.num_bytes for name, t in held_out.items()}
    assert last == ["bits a byte", "", *(f"{bits[name]:.2f}" for name in data.SHARES)]


def test_the_card_has_the_runs_numbers(work: Path) -> None:
    text = (work / "out" / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(work / "out")
    assert f"A Qwen3-Next model of {sum(p.numel() for p in loaded.parameters()):,} parameters" in text
    assert (
        f"{STEPS} steps of {SEQUENCES} sequences of {LENGTH} tokens: {STEPS * SEQUENCES * LENGTH:,} tok"
        in text
    )
    assert _rows(text, "package")[2] == ["`made`", "1", "numbers", "none", f"`{'ab' * 32}`"]
    experts = _rows(text, "layer")[2:]
    assert [row[0] for row in experts] == ["0, DeltaNet", "1, DeltaNet", "2, DeltaNet", "3, attention"]
