"""The demo checkpoint that ships: transformers loads it unchanged, it writes English, its card is honest."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_runtime.modelfiles import resolve_model
from moe_runtime.tokenizer import load_tokenizer
from moe_runtime.weights.index import read_index

# Written for this test, so in no training text.
PARAGRAPH = (
    "The old woman had lived in the house by the river for many years, and she knew every tree in the garden. "
    "In the morning she would open the window, look at the water and think of her sister, who had gone away "
    "when they were both very young. She did not expect to see her again, but she was not unhappy; the evenings "
    "were long and quiet, and her neighbours often came to talk to her about the news of the day."
)
CODE = """\
Return a list of the values in the given dictionary. If the optional argument is true, the values are sorted::

   def values(mapping, ordered=False):
       found = list(mapping.values())
       if ordered:
           found.sort()
       return found

Raise a TypeError if the argument is not a mapping, or if two of its values cannot be compared with each other.
"""
PROMPTS = ("She was very much", "The function returns", "It is a small animal that", "He had never been")


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve_model(None).path


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    return model.float()


@pytest.fixture(scope="module")
def untrained(loaded: Any) -> Any:
    """The same model with weights as they are before training."""
    torch.manual_seed(0)
    return type(loaded)(loaded.config).float()


def encode(text: str) -> list[int]:
    return load_tokenizer(resolve_model(None)).encode(text)


def bits_per_byte(model: Any, text: str) -> float:
    """What a byte of `text` costs the model, its first token aside."""
    ids = torch.tensor([encode(text)])
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss
    return float(loss) * (ids.shape[1] - 1) / len(text.encode()) / math.log(2)


def written(model: Any) -> list[str]:
    """What the model makes of PROMPTS, sampled as generation_config.json says."""
    tokenizer, texts = load_tokenizer(resolve_model(None)), []
    torch.manual_seed(0)
    for prompt in PROMPTS:
        ids = torch.tensor([encode(prompt)])
        sampled = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=60, temperature=0.7, top_p=0.9,
            top_k=20, repetition_penalty=1.05, eos_token_id=[2, 0], pad_token_id=0,
        )  # fmt: skip
        texts.append(tokenizer.decode(sampled[0, ids.shape[1] :].tolist()))
    return texts


def share_of_known_words(texts: list[str]) -> float:
    """The share of the words of `texts` that the tokenizer has as one token: whole words that its text often had."""
    tokenizer = load_tokenizer(resolve_model(None))
    known = {token[1:] for token in map(tokenizer.token, range(4096)) if re.fullmatch(" [a-z]+", token)}
    words = [word for text in texts for word in re.findall(r"[A-Za-z]+", text)[1:-1]]
    assert len(words) > 50, texts
    return sum(word.lower() in known for word in words) / len(words)


def test_sampling_defaults(loaded: Any) -> None:
    config = loaded.generation_config
    assert config.eos_token_id == [2, 0]
    assert (config.temperature, config.top_p, config.top_k) == (0.7, 0.9, 20)
    assert config.repetition_penalty == 1.05


def test_experts_are_stored_one_by_one_as_on_the_hub() -> None:
    index = read_index(resolve_model(None))
    assert index["model.layers.3.mlp.experts.31.down_proj.weight"].shape == (128, 64)
    assert {entry.dtype for entry in index.values()} == {"BF16"}
    assert sum(".experts." in name for name in index) == 4 * 32 * 3


def test_the_model_predicts_english(loaded: Any, untrained: Any) -> None:
    assert bits_per_byte(loaded, PARAGRAPH) < 1.5
    assert bits_per_byte(untrained, PARAGRAPH) > 2.6


def test_the_model_knows_the_order_of_words(loaded: Any) -> None:
    words = PARAGRAPH.split()
    random.Random(0).shuffle(words)
    assert bits_per_byte(loaded, " ".join(words)) > bits_per_byte(loaded, PARAGRAPH) + 0.6


def test_the_model_writes_words(loaded: Any, untrained: Any) -> None:
    assert share_of_known_words(written(loaded)) > 0.85
    assert share_of_known_words(written(untrained)) < 0.75


def test_the_model_answers_and_ends_its_turn(loaded: Any) -> None:
    tokenizer = load_tokenizer(resolve_model(None))
    ids = torch.tensor([encode(tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}]))])
    answer = loaded.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=80, eos_token_id=[2, 0],
        pad_token_id=0,
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    assert answer[-1] == 2, tokenizer.decode(answer)
    assert tokenizer.decode(answer).startswith("Hello")


def choices(model: Any, text: str) -> torch.Tensor:
    """How often each layer's router chooses each expert for `text`: [layers, E], a layer's sum 1."""
    with torch.inference_mode():
        routers = model(input_ids=torch.tensor([encode(text)]), output_router_logits=True).router_logits
    counts = [torch.bincount(logits.topk(4).indices.flatten(), minlength=32) for logits in routers]
    return torch.stack([count / count.sum() for count in counts])


def test_all_experts_serve_and_some_have_a_subject(loaded: Any) -> None:
    prose, code = choices(loaded, PARAGRAPH), choices(loaded, CODE)
    assert prose.shape == (4, 32)
    assert ((prose + code) > 0).sum(1).min() >= 24
    differing = (prose - code).abs().sum(
        1
    ) / 2  # 0 where prose and code go to the same experts, 1 where to others
    assert differing.max() > 0.4


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
    assert sum(files.values()) < 20_000_000


def test_card_says_what_it_is(directory: Path, loaded: Any) -> None:
    card = (directory / "README.md").read_text(encoding="utf-8")
    for words in (
        "license: apache-2.0",
        f"{sum(p.numel() for p in loaded.parameters()):,} parameters",
        "what it says is often wrong",
        "scripts/train_demo_checkpoint.py",
        "r-cran-janeaustenr",
        "WordNet 3.0 license",
        "PSF License Agreement",
        "made by rule",
        "Seed",
    ):
        assert words in card
    assert len(re.findall(r"`[0-9a-f]{64}`", card)) == 5  # a digest of each package


def test_tokenizer_is_a_byte_level_bpe_with_three_special_tokens(directory: Path) -> None:
    saved = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert len(saved["model"]["vocab"]) == config["vocab_size"] == 4096
    assert [t["content"] for t in saved["added_tokens"]] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = load_tokenizer(resolve_model(None))
    text = "def route(x):\n    return x @ gate  # 日本語 👍 é e\u0301"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(encode(PARAGRAPH)) < len(PARAGRAPH) / 3.5  # it was trained, on English
