"""The bytes of every token, which is what a grammar is matched against."""

from __future__ import annotations

import re
from collections.abc import Callable

from moe_runtime.errors import ConfigError
from moe_runtime.tokenizer import Tokenizer
from moe_runtime.tokenizer.backends import byte_of_char

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\u2581"  # SentencePiece's space
_ENOUGH_BYTES = 128  # pieces of one byte that a vocabulary of bytes has at least


def vocabulary_bytes(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """Bytes of tokens 0 to vocab_size - 1; b"" for special and unused ones, which no grammar lets through.

    Raises ConfigError for a kind of vocabulary whose bytes are not known.
    """
    known = min(vocab_size, tokenizer.vocab_size)
    if tokenizer.token_bytes(0) is not None:
        found = [tokenizer.token_bytes(token, skip_special_tokens=True) or b"" for token in range(known)]
    else:
        pieces = [None if tokenizer.is_special(token) else tokenizer.piece(token) for token in range(known)]
        to_bytes = _decoder_of(set(filter(None, pieces)), tokenizer.source)
        found = [to_bytes(piece) if piece else b"" for piece in pieces]
    return found + [b""] * (vocab_size - known)


def _decoder_of(pieces: set[str], source: str) -> Callable[[str], bytes]:
    """How pieces of a vocabulary, special ones left out, spell bytes."""
    if sum(bool(_BYTE_PIECE.fullmatch(piece)) for piece in pieces) >= _ENOUGH_BYTES or any(
        piece.startswith(_WORD_START) for piece in pieces
    ):
        return _sentencepiece_bytes
    alphabet = byte_of_char()
    if sum(char in pieces for char in alphabet) >= _ENOUGH_BYTES:
        return lambda piece: _byte_level_bytes(piece, alphabet)
    raise ConfigError(
        f"structured_outputs does not know how the tokenizer of {source} spells bytes; byte-level BPE and "
        "SentencePiece vocabularies are supported"
    )


def _sentencepiece_bytes(piece: str) -> bytes:
    if found := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(found[1])
    return piece.replace(_WORD_START, " ").encode()


def _byte_level_bytes(piece: str, alphabet: dict[str, int]) -> bytes:
    try:
        return bytes(alphabet[char] for char in piece)
    except KeyError:  # an added token with a character outside the byte alphabet stands for itself
        return piece.encode()
