"""The script that trains the demo checkpoint: its forward pass is transformers', its text is clean, its runs repeat."""

from __future__ import annotations

import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from demo_training import data, model, tokenizer, training
from demo_training.conversations import define
from demo_training.forward import check_against_transformers, forward
from demo_training.muon import orthogonal
from demo_training.sources import r_character_vectors
from moe_runtime.modelfiles import resolve_model


def test_the_forward_pass_is_transformers() -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, tokenizer.VOCAB_SIZE, (2, 128), generator=torch.Generator().manual_seed(3))
    trained = AutoModelForCausalLM.from_pretrained(resolve_model(None).path).float()
    for subject in (model.new_model(0), trained):
        assert check_against_transformers(subject, ids) < 1e-4


def test_a_different_forward_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = model.new_model(0)
    monkeypatch.setattr("demo_training.forward.causal_conv", lambda x, weight: x)
    with pytest.raises(AssertionError, match="logits differ from transformers'"):
        check_against_transformers(subject, torch.arange(64).view(1, 64))


def test_shipped_files_are_the_scripts() -> None:
    directory = resolve_model(None).path
    shipped = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    wanted = {
        **model.model_config().to_dict(),
        "architectures": ["Qwen3NextForCausalLM"],
        "dtype": "bfloat16",
    }
    assert {key: wanted.get(key) for key in shipped if key != "transformers_version"} == {
        key: value for key, value in shipped.items() if key != "transformers_version"
    }
    assert (directory / "chat_template.jinja").read_text(encoding="utf-8") == tokenizer.CHAT_TEMPLATE
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config == tokenizer.tokenizer_config()


def test_the_tokenizers_training_is_deterministic() -> None:
    texts = [
        f"the {word} of the {word}s, {number}"
        for number in range(40)
        for word in ("house", "expert", "model")
    ]
    first, second = (tokenizer.train_tokenizer(iter(texts)).to_str() for _ in range(2))
    assert first == second


def make_tokens(length: int = 5000) -> dict[str, training.Tokens]:
    """Domains whose tokens follow a simple rule."""
    ids = np.arange(length) * 7 % 500
    return {name: training.Tokens(ids, np.arange(0, length - 300, 10), 4 * length) for name in data.SHARES}


def run(directory: Path, budget: training.Budget) -> training.Trainer:
    trainer = training.Trainer(model.new_model(1), directory, seed=5)
    trainer.run(make_tokens(), {}, budget)
    return trainer


def test_a_run_learns_and_repeats_from_its_number_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "SEQUENCES", 2)
    monkeypatch.setattr(training, "LENGTH", 64)
    monkeypatch.setattr(training, "LOG_STEPS", 1)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    clocked = run(tmp_path / "a", training.Budget(None, 0.05, 10.0))
    losses = [json.loads(line)["loss"] for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert losses[-1] < losses[0] - 0.2
    counted = run(tmp_path / "b", training.Budget(clocked.progress.steps, 1.0, 1.0))
    for ours, theirs in zip(clocked.model.parameters(), counted.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    again = training.Trainer(model.new_model(2), tmp_path / "a", seed=5)  # goes on from what was saved
    assert again.progress.step == clocked.progress.steps
    assert torch.equal(next(again.model.parameters()), next(clocked.model.parameters()))


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    budget = training.Budget(1000, 1.0, 1.0)
    rates = [budget.rate(step) for step in range(1001)]
    assert rates[0] < training.PEAK_RATE / 10
    assert set(rates[training.WARMUP_STEPS : 650]) == {training.PEAK_RATE}
    assert rates[1000] == 0
    assert sorted(rates[650:], reverse=True) == rates[650:]


def test_the_number_of_steps_is_fixed_when_the_rate_begins_to_fall() -> None:
    budget = training.Budget(None, 10.0, 100.0)
    budget.decide(500, cpu_s=380.0, wall_s=500.0)
    assert budget.steps is None
    budget.decide(650, cpu_s=391.0, wall_s=500.0)
    assert budget.steps == 1000


def test_balance_is_one_where_all_experts_serve_alike() -> None:
    probs = torch.full((8, 4), 0.25)
    even, one = torch.arange(8).view(8, 1) % 4, torch.zeros(8, 1, dtype=torch.long)
    assert float(training.balance_loss([(probs, even)])) == pytest.approx(1)
    sure = torch.nn.functional.one_hot(one.squeeze(1), 4).float()
    assert float(training.balance_loss([(sure, one)])) == pytest.approx(4)


def test_muon_makes_matrices_nearly_orthogonal() -> None:
    stack = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    for made in (orthogonal(stack), orthogonal(stack.mT).mT):
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.5
        assert values.max() < 1.5


def test_a_forward_pass_reports_the_routers_choices() -> None:
    subject = model.new_model(0)
    _, routing = forward(subject, torch.zeros(1, 32, dtype=torch.long))
    assert [(probs.shape, chosen.shape) for probs, chosen in routing] == [((32, 32), (32, 4))] * 4


def test_validation_text_is_whole_blocks_that_training_lacks() -> None:
    units = [str(number) for number in range(4321)]
    kept, held_out = data.split(units)
    assert sorted(kept + held_out, key=int) == units
    assert held_out == [*units[980:1000], *units[2980:3000]]


def test_markup_is_taken_out_of_documentation() -> None:
    source = ".. module:: json\n   :synopsis: Encode.\n\nUse :func:`~json.dumps` or ``load``; see `here <http://x>`_.\n"
    assert data.plain(source).strip() == "Use json.dumps or `load`; see here."


def test_a_definition_is_a_turn_of_each() -> None:
    text = define("apple", "noun", 'fruit with red skin; a pome; "she ate an apple"', random.Random(0))
    answer = 'The noun apple means fruit with red skin. For example: "she ate an apple"'
    assert text.endswith(f"<|im_start|>assistant\n{answer}<|im_end|>\n")
    assert text.startswith("<|im_start|>user\n")


def test_r_character_vectors_are_read(tmp_path: Path) -> None:
    strings = [b"", "caf\u00e9".encode(), b"two lines"]
    body = b"".join(struct.pack(">Ii", 0x00040009, len(s)) + s for s in strings)
    record = (
        b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8" + struct.pack(">Ii", 16, len(strings)) + body
    )
    packed = zlib.compress(record)
    (tmp_path / "a.rdb").write_bytes(2 * (struct.pack(">I", len(packed)) + packed))
    assert list(r_character_vectors(tmp_path / "a.rdb")) == 2 * [["", "caf\u00e9", "two lines"]]
