"""Encode, decode and special tokens agree with transformers; broken or missing files get one clear error."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from moe_runtime.errors import ConfigError, ModelNotFoundError, PromptError
from moe_runtime.modelfiles import ModelFiles, resolve_model
from moe_runtime.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two spaces\n\n\tand a tab  ",
    "naïve café — Ünïcödé",
    "日本語とemoji 👩‍👩‍👧 🏳️‍🌈",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start> not special <|im_end",
    "e\u0301 combining, \u200bzero width, \ufffd replacement, \x00 nul",
]


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer(resolve_model(None))


@pytest.fixture(scope="module")
def oracle() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model(None).path)


def _files(directory: Path, config: dict[str, Any] | None = None) -> ModelFiles:
    return dataclasses.replace(resolve_model(None), path=directory, tokenizer_config=config)


def sentencepiece_style() -> RustTokenizer:
    """A tokenizer of Llama's kind: U+2581 for spaces, byte fallback, a leading space, <s> before every text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [
        "\u2581",
        *"abcdehlorw,",
        "\u2581a",
        "\u2581he",
        "ll",
        "\u2581w",
        "or",
        "\u2581hell",
        "\u2581wor",
    ]
    merges = [("\u2581", "a"), ("l", "l"), ("\u2581", "w"), ("o", "r"), ("\u2581w", "or")]
    tokenizer = RustTokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


# --------------------------------------------------------------------------- agreement with transformers


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_as_transformers(
    demo: Tokenizer, oracle: Any, text: str, add_special_tokens: bool
) -> None:
    ids = demo.encode(text, add_special_tokens)
    assert ids == oracle.encode(text, add_special_tokens=add_special_tokens)
    for skip in (True, False):
        assert demo.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)
    assert demo.decode(ids, skip_special_tokens=False) == text


@given(st.lists(st.integers(0, 4095), max_size=40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_decode_any_ids_as_transformers(demo: Tokenizer, oracle: Any, ids: list[int], skip: bool) -> None:
    assert demo.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_facts_as_transformers(demo: Tokenizer, oracle: Any) -> None:
    assert demo.vocab_size == len(oracle) == 4096
    assert demo.eos_token_id == oracle.eos_token_id == 2
    assert demo.bos_token_id is None
    assert oracle.bos_token_id is None
    assert demo.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert demo.token_to_id("<|im_start|>") == 1
    assert demo.token_to_id("no such token") is None


def test_special_tokens_around_every_text_as_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    sentencepiece_style().save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = load_tokenizer(_files(tmp_path, config)), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("hello world", " a", "or\u00e9", ""):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.encode("a")[0] == ours.bos_token_id == 1
    assert ours.eos_token_id == 2


# --------------------------------------------------------------------------- single tokens


def test_token_is_readable(demo: Tokenizer) -> None:
    assert [demo.token(i) for i in demo.encode(" of the<|im_end|>")] == [" of", " the", "<|im_end|>"]
    assert [demo.token(i) for i in demo.encode("👍")] == ["\ufffd"] * 4
    assert demo.token(5000) == demo.token(-1) == ""


def test_token_keeps_the_leading_space_of_other_tokenizers(tmp_path: Path) -> None:
    sentencepiece_style().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(_files(tmp_path))
    ids = tokenizer.encode("a world", False)
    assert "".join(map(tokenizer.token, ids)) == " a world"


def test_ids_past_the_vocabulary_are_no_text(demo: Tokenizer) -> None:
    ids = demo.encode("end")
    assert demo.decode([*ids, 5000, -1, 2**40]) == "end"


def test_what_is_no_text_is_refused(demo: Tokenizer) -> None:
    with pytest.raises(
        PromptError, match=r"the prompt holds '\\ud800' at position 2, which is no character; remove"
    ):
        demo.encode("ab\ud800")
    with pytest.raises(PromptError, match="a prompt must be text, not int"):
        demo.encode(7)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- what the files may hold


def test_truncation_and_padding_in_the_file_do_not_apply(tmp_path: Path, demo: Tokenizer) -> None:
    rust = RustTokenizer.from_file(str(resolve_model(None).path / "tokenizer.json"))
    rust.enable_truncation(3)
    rust.enable_padding(length=50)
    rust.save(str(tmp_path / "tokenizer.json"))
    text = "a rather long prompt that must stay whole"
    assert load_tokenizer(_files(tmp_path)).encode(text) == demo.encode(text)


def test_tokens_that_only_the_config_knows_are_added(tmp_path: Path) -> None:
    shutil.copy(resolve_model(None).path / "tokenizer.json", tmp_path)
    added = {
        "4097": {"content": "<tool>", "special": False, "normalized": False},
        "4096": {"content": "<|extra|>", "special": True},
        "2": {"content": "<|im_end|>", "special": True},
    }
    tokenizer = load_tokenizer(_files(tmp_path, {"added_tokens_decoder": added}))
    ids = tokenizer.encode("<|extra|><tool><|im_end|>")
    assert ids == [4096, 4097, 2]
    assert tokenizer.decode(ids) == "<tool>"
    assert tokenizer.vocab_size == 4098
    with pytest.raises(
        ConfigError, match=r"gives '<x>' the id 5000, but the next free id of the vocabulary is 4096"
    ):
        load_tokenizer(_files(tmp_path, {"added_tokens_decoder": {"5000": {"content": "<x>"}}}))


def test_special_tokens_from_the_older_map(tmp_path: Path) -> None:
    shutil.copy(resolve_model(None).path / "tokenizer.json", tmp_path)
    old = {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|im_start|>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(old))
    tokenizer = load_tokenizer(_files(tmp_path, {"eos_token": "<|im_end|>", "unk_token": None}))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert "unk_token" not in tokenizer.special_tokens


def test_unusable_special_token(tmp_path: Path) -> None:
    shutil.copy(resolve_model(None).path / "tokenizer.json", tmp_path)
    with pytest.raises(ConfigError, match=r"eos_token in tokenizer_config\.json is 7; it must be a string"):
        load_tokenizer(_files(tmp_path, {"eos_token": 7}))


def test_broken_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(
        ConfigError, match=r"tokenizer\.json is no tokenizer that the tokenizers library can read"
    ):
        load_tokenizer(_files(tmp_path))


def test_no_tokenizer(tmp_path: Path) -> None:
    words = r"has no tokenizer: neither tokenizer\.json nor any of vocab\.json, .*; copy the tokenizer's files there"
    with pytest.raises(ModelNotFoundError, match=words):
        load_tokenizer(_files(tmp_path))
    assert find_tokenizer(_files(tmp_path)) is None


# --------------------------------------------------------------------------- the fallback


@pytest.fixture
def legacy_directory(tmp_path: Path) -> Path:
    """The demo tokenizer in GPT-2's older pair of files."""
    demo_path = resolve_model(None).path
    saved = json.loads((demo_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(saved["vocab"]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in saved["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(merges) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"architectures": ["X"], "model_type": "gpt2"}')
    return tmp_path


def test_without_tokenizer_json_transformers_reads_the_rest(demo: Tokenizer, legacy_directory: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(legacy_directory))
    text = "An ordinary sentence, 1 é and 👍."
    ids = tokenizer.encode(text)
    assert ids == demo.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 2]) == text
    assert tokenizer.decode([*ids, 2], skip_special_tokens=False) == f"{text}<|im_end|>"
    assert tokenizer.vocab_size >= 4096
    assert tokenizer.eos_token_id == 2
    assert tokenizer.token(demo.encode(" the")[0]) == " the"
    assert tokenizer.token(10**6) == ""


def test_fallback_without_transformers(legacy_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    words = r"has no tokenizer\.json, and .* needs transformers; pip install 'moe-runtime\[transformers\]'"
    for load in (load_tokenizer, find_tokenizer):
        with pytest.raises(ConfigError, match=words):
            load(resolve_model(legacy_directory))


def test_the_common_way_does_not_import_transformers() -> None:
    code = (
        "import sys; from moe_runtime.modelfiles import resolve_model; from moe_runtime.tokenizer import *;"
        "t = load_tokenizer(resolve_model(None)); t.apply_chat_template([{'role': 'user', 'content': 'hi'}]);"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_added_token_outside_the_byte_alphabet_stands_for_itself(tmp_path: Path) -> None:
    rust = RustTokenizer.from_file(str(resolve_model(None).path / "tokenizer.json"))
    rust.add_tokens([AddedToken("<a b>"), AddedToken("<日本>")])
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(_files(tmp_path))
    for token_id in range(tokenizer.vocab_size):
        as_bytes = tokenizer.token_bytes(token_id, skip_special_tokens=False)
        assert as_bytes is not None
        assert as_bytes.decode(errors="replace") == tokenizer.decode([token_id], skip_special_tokens=False)
