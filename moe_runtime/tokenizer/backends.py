"""The two ways to tokenise: the `tokenizers` library on tokenizer.json, or else transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from moe_runtime.errors import ConfigError, ModelNotFoundError

TOKENIZER_FILE = "tokenizer.json"
_SHORT_TEXT = 4096  # characters that are encoded in less time than other threads would miss
# What a tokenizer without tokenizer.json is made of; without any of these transformers cannot help either.
_LEGACY_FILES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


class TokenizerBackend(Protocol):
    """What `Tokenizer` needs from a library."""

    vocab_size: int  # ids in use, added tokens included
    special_ids: frozenset[int]  # tokens that stand for no text

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...

    def token_to_id(self, token: str) -> int | None: ...

    def id_to_token(self, token_id: int) -> str | None: ...

    def token_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes | None:
        """The bytes that the token stands for, where a text is the UTF-8 decoding of its tokens' bytes; else None."""
        ...


class JsonBackend:
    """A `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, file: Path, tokenizer_config: Mapping[str, Any]) -> None:
        try:
            self._rust = RustTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(
                f"{file} is no tokenizer that the tokenizers library can read: {error}"
            ) from error
        # A file may carry the truncation and padding of its training; a prompt must be neither cut nor padded.
        self._rust.no_truncation()
        self._rust.no_padding()
        self._add_tokens(file, tokenizer_config.get("added_tokens_decoder") or {})
        self.vocab_size: int = self._rust.get_vocab_size(with_added_tokens=True)
        added = self._rust.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._byte_of_char = byte_of_char() if isinstance(self._rust.decoder, decoders.ByteLevel) else None

    def _add_tokens(self, file: Path, added: Mapping[str, Any]) -> None:
        """Add the tokens that only tokenizer_config.json knows, in the order of their ids."""
        known = self._rust.get_vocab(with_added_tokens=True)
        for token_id, fields in sorted(added.items(), key=lambda item: int(item[0])):
            content = fields["content"]
            if content in known:
                continue
            flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
            token = AddedToken(content, **{flag: fields[flag] for flag in flags if flag in fields})
            add = self._rust.add_special_tokens if fields.get("special") else self._rust.add_tokens
            add([token])
            if self._rust.token_to_id(content) != int(token_id):
                raise ConfigError(
                    f"{file}: tokenizer_config.json gives {content!r} the id {token_id}, but the next free id of the "
                    f"vocabulary is {self._rust.token_to_id(content)}"
                )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) <= _SHORT_TEXT:
            encoding = self._rust.encode(text, add_special_tokens=add_special_tokens)
        else:
            # The same tokens; but `encode` keeps every thread of the process waiting, for seconds a megabyte.
            (encoding,) = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._rust.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_to_id(self, token: str) -> int | None:
        token_id: int | None = self._rust.token_to_id(token)
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        token: str | None = self._rust.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        return token

    def token_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes | None:
        if self._byte_of_char is None:
            return None
        token = self.id_to_token(token_id)
        if token is None or (skip_special_tokens and token_id in self.special_ids):
            return b""
        try:
            return bytes(self._byte_of_char[char] for char in token)
        except KeyError:  # an added token with a character outside the byte alphabet stands for itself
            return token.encode()


class TransformersBackend:
    """Whatever transformers' AutoTokenizer makes of the directory."""

    def __init__(self, auto_tokenizer: Any) -> None:
        self._auto = auto_tokenizer
        self.vocab_size: int = len(auto_tokenizer)
        self.special_ids = frozenset(auto_tokenizer.all_special_ids)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._auto.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._auto.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def token_to_id(self, token: str) -> int | None:
        token_id: int | None = self._auto.get_vocab().get(token)
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        return self._auto.convert_ids_to_tokens(token_id) if 0 <= token_id < self.vocab_size else None

    def token_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes | None:
        return None


def load_backend(directory: Path, tokenizer_config: Mapping[str, Any]) -> TokenizerBackend:
    """The backend for a model directory.

    Raises ModelNotFoundError where there is no tokenizer, ConfigError where it cannot be read.
    """
    file = directory / TOKENIZER_FILE
    if file.is_file():
        return JsonBackend(file, tokenizer_config)
    if not any((directory / name).is_file() for name in _LEGACY_FILES):
        raise ModelNotFoundError(
            f"{directory} has no tokenizer: neither {TOKENIZER_FILE} nor any of {', '.join(_LEGACY_FILES)}; "
            f"copy the tokenizer's files there, or send prompts as token ids"
        )
    try:
        # Imported here because it takes seconds, and only a directory without tokenizer.json needs it.
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            f"{directory} has no {TOKENIZER_FILE}, and reading its older tokenizer files needs transformers; "
            f"pip install 'moe-runtime[transformers]'"
        ) from error
    try:
        return TransformersBackend(AutoTokenizer.from_pretrained(directory, local_files_only=True))
    except Exception as error:  # whatever a tokenizer class raises is about these files
        raise ConfigError(f"transformers cannot read the tokenizer in {directory}: {error}") from error


def byte_of_char() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet stands for.

    The alphabet (GPT-2's) gives printable Latin-1 bytes their own character and the others, in order, the
    characters from U+0100 on.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {char: ord(char) for char in alphabet if ord(char) < 0x100}
    others = sorted(set(range(256)) - set(own.values()))
    return own | dict(zip((char for char in alphabet if ord(char) >= 0x100), others, strict=True))
