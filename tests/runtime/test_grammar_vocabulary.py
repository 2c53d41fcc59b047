"""The bytes that tokens stand for, by kind of vocabulary."""

from __future__ import annotations

import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.grammar.vocabulary import vocabulary_bytes
from moe_runtime.tokenizer import Tokenizer
from moe_runtime.tokenizer.backends import byte_of_char
from moe_runtime.tokenizer.chat_template import ChatTemplates
from tests.runtime.structured_rank import VOCAB, demo_tokenizer


class _Pieces:
    """A backend that knows nothing but its pieces, as that of an older tokenizer; the first one is special."""

    special_ids = frozenset({0})

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces
        self.vocab_size = len(pieces)

    def id_to_token(self, token_id: int) -> str | None:
        return self._pieces[token_id]

    def token_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes | None:
        return None


def _bytes(pieces: list[str], vocab_size: int) -> list[bytes]:
    backend = _Pieces(["<s>", *pieces])
    tokenizer = Tokenizer(backend, special_tokens={}, templates=ChatTemplates({}, ""), source="x")  # type: ignore[arg-type]
    return vocabulary_bytes(tokenizer, vocab_size)


def test_a_byte_level_vocabulary_spells_texts_and_special_tokens_spell_nothing() -> None:
    found = vocabulary_bytes(demo_tokenizer(), VOCAB + 3)
    text = 'é👍 {"a": 1}\n'
    assert b"".join(found[token] for token in demo_tokenizer().encode(text, False)) == text.encode()
    assert found[VOCAB:] == [b""] * 3
    assert {token for token in range(VOCAB) if not found[token]} == {
        token for token in range(VOCAB) if demo_tokenizer().is_special(token)
    }
    assert vocabulary_bytes(demo_tokenizer(), 300) == found[:300]


def test_a_sentencepiece_vocabulary_has_bytes_and_spaces() -> None:
    assert _bytes(["<0x0A>", "<0xC3>", "\u2581a\u2581é", "b"], 7) == [
        b"", b"\n", b"\xc3", " a é".encode(), b"b", b"", b"",
    ]  # fmt: skip


def test_a_byte_level_vocabulary_is_known_by_its_pieces() -> None:
    alphabet = byte_of_char()
    char_of_byte = {byte: char for char, byte in alphabet.items()}
    spelled = "".join(char_of_byte[byte] for byte in " é".encode())
    found = _bytes([*alphabet, spelled, "<a b>"], 259)
    assert found[1:257] == [bytes([byte]) for byte in alphabet.values()]
    assert found[257:] == [" é".encode(), b"<a b>"]


def test_a_vocabulary_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not know how the tokenizer of x spells bytes"):
        _bytes(["[CLS]", "un", "##able"], 4)
