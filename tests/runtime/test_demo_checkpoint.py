"""The demo checkpoint that ships: transformers loads it unchanged, its files are small data, its card is honest."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moe_runtime.modelfiles import resolve_model
from moe_runtime.tokenizer import load_tokenizer
from moe_runtime.weights.index import read_index

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve_model(None).path


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_demo_checkpoint", ROOT / "scripts/make_demo_checkpoint.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    loaded, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return loaded


def test_transformers_loads_it_unchanged(model: Any) -> None:
    assert type(model).__name__ == "Qwen3NextForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.generation_config.eos_token_id == [2, 0]
    assert (model.generation_config.temperature, model.generation_config.top_p) == (0.7, 0.8)
    assert model.generation_config.top_k == 20


def test_experts_are_stored_one_by_one_as_on_the_hub() -> None:
    index = read_index(resolve_model(None))
    assert index["model.layers.3.mlp.experts.31.down_proj.weight"].shape == (64, 16)
    assert {entry.dtype for entry in index.values()} == {"BF16"}
    assert sum(".experts." in name for name in index) == 4 * 32 * 3


def test_the_random_model_prefers_some_tokens_and_depends_on_its_past(model: Any) -> None:
    ids = torch.tensor(load_tokenizer(resolve_model(None)).encode("The experts of this model are"))
    other = ids.clone()
    other[0] = 500
    with torch.inference_mode():
        logits = model.float()(torch.stack([ids, other])).logits
    assert logits.isfinite().all()
    last = logits[:, -1].log_softmax(-1)
    assert last[0].max() - last[0].median() > 3
    assert (last[0] - last[1]).abs().max() > 0.1


def test_only_small_data(directory: Path) -> None:
    files = {file.name: file.stat().st_size for file in directory.iterdir()}
    assert set(files) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 1_500_000


def test_card_says_what_it_is(directory: Path) -> None:
    card = (directory / "README.md").read_text(encoding="utf-8")
    for words in (
        "The weights are random",
        "PSF License Agreement",
        "license: apache-2.0",
        "standard library",
    ):
        assert words in card


def test_tokenizer_is_a_byte_level_bpe_with_three_special_tokens(directory: Path) -> None:
    saved = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    assert (
        len(saved["model"]["vocab"])
        == json.loads((directory / "config.json").read_text())["vocab_size"]
        == 1024
    )
    assert [t["content"] for t in saved["added_tokens"]] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = load_tokenizer(resolve_model(None))
    text = "def route(x):\n    return x @ gate  # 日本語 👍 é e\u0301"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    english = "The function returns a list of the values that are used by the class."
    assert len(tokenizer.encode(english)) < len(english) / 2.5  # it was trained, on English


def test_training_is_deterministic(script: ModuleType) -> None:
    texts = [text for text, _ in zip(script.corpus(), range(400), strict=False)]
    first, second = (script.train_tokenizer(iter(texts)).to_str() for _ in range(2))
    assert first == second
    assert len(texts) == 400


def test_shipped_template_and_weights_are_the_scripts(
    script: ModuleType, directory: Path, model: Any
) -> None:
    assert (directory / "chat_template.jinja").read_text(encoding="utf-8") == script.CHAT_TEMPLATE
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config == script.tokenizer_config()
    fresh = type(model)(script.model_config())
    script.draw_weights(fresh, script.SEED)
    shipped = model.state_dict()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor.to(torch.bfloat16), shipped[name].to(torch.bfloat16)), name
