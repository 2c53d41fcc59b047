"""The tokenizer of a model: encode, decode, special tokens, chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError, ModelNotFoundError, PromptError
from moe_runtime.modelfiles import ModelFiles, read_json_object
from moe_runtime.tokenizer.backends import TokenizerBackend, load_backend
from moe_runtime.tokenizer.chat_template import ChatTemplates, Message, read_chat_templates

# Keys of tokenizer_config.json that name one special token each, and that chat templates may use.
_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text <-> token ids for one model. Made by `load_tokenizer`.

    Texts are decoded as the tokenizer's own decoder gives them: the optional clean-up of spaces before
    punctuation, which some old tokenizer_config.json files ask for, is not applied, since a stream could
    not take back a space that it has sent.
    """

    def __init__(
        self,
        backend: TokenizerBackend,
        *,
        special_tokens: Mapping[str, str | list[str]],
        templates: ChatTemplates,
        source: str,
    ) -> None:
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._templates = templates
        self.source = source  # where it came from, for messages
        # Texts of tokens that hold whole characters, as detokenizers find them: by skip_special_tokens, and by token.
        self.whole_texts: dict[bool, dict[int, str]] = {False: {}, True: {}}

    @property
    def vocab_size(self) -> int:
        """Token ids in use, added tokens included; the model's own vocabulary may be padded beyond."""
        return self._backend.vocab_size

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end-of-sequence token; generation_config.json may name more."""
        return self._special_id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def special_tokens(self) -> dict[str, str | list[str]]:
        """Special tokens by role ("eos_token": "<|im_end|>", ...)."""
        return dict(self._special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates.by_name)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` also those that the tokenizer puts around every text.

        A rendered chat template already holds its special tokens: encode it with add_special_tokens=False.
        Raises PromptError for what is no text.
        """
        try:
            return self._backend.encode(text, add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise PromptError(_why_no_text(text)) from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that form no UTF-8 character become U+FFFD, unknown ids nothing."""
        return self._backend.decode(self._known(ids), skip_special_tokens)

    def token(self, token_id: int) -> str:
        """The text that one token stands for, special tokens and a leading space included; "" if unknown."""
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return ""
        text = self._backend.decode([token_id], False)
        # SentencePiece decoders drop the space at the start of a text, which a single token's text keeps.
        return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes | None:
        """The bytes of a token of a byte-level tokenizer, b"" if skipped or unknown; None for other tokenizers."""
        return self._backend.token_bytes(token_id, skip_special_tokens)

    def piece(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it; None if unknown."""
        return self._backend.id_to_token(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether a token stands for no text."""
        return token_id in self._backend.special_ids

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Render a conversation as the text that the model expects.

        Args:
            messages: `{"role": ..., "content": ...}`, oldest first.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON descriptions of functions that the model may call.
            chat_template: a template's text, or the name of one of the model's, instead of its default.
            kwargs: further variables of the template, such as enable_thinking.

        Raises ConfigError where there is no template or it is broken, PromptError where it refuses the messages.
        """
        return self._templates.render(
            messages,
            template=chat_template,
            tools=tools,
            variables={**self._special_tokens, **kwargs, "add_generation_prompt": add_generation_prompt},
        )

    def _known(self, ids: Iterable[int]) -> list[int]:
        # The model's vocabulary may be padded: ids past the tokenizer's stand for no text. Negative ones
        # would overflow inside the library.
        return [i for i in ids if 0 <= i < 2**32]

    def _special_id(self, role: str) -> int | None:
        token = self._special_tokens.get(role)
        return self._backend.token_to_id(token) if isinstance(token, str) else None


def _why_no_text(text: object) -> str:
    if not isinstance(text, str):
        return f"a prompt must be text, not {type(text).__name__}"
    # Python's strings may hold half of a UTF-16 pair, as broken JSON escapes do; no tokenizer takes it.
    position = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), 0)
    return f"the prompt holds {text[position]!r} at position {position}, which is no character; remove it"


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """The tokenizer in a model's directory.

    Raises ModelNotFoundError where there is none, ConfigError where its files are broken.
    """
    config = files.tokenizer_config or {}
    return Tokenizer(
        load_backend(files.path, config),
        special_tokens=_special_tokens(files.path, config),
        templates=read_chat_templates(files.path, config),
        source=str(files.path),
    )


def find_tokenizer(files: ModelFiles) -> Tokenizer | None:
    """Like `load_tokenizer`, but None where the directory holds no tokenizer."""
    try:
        return load_tokenizer(files)
    except ModelNotFoundError:
        return None


def find_eos_token_ids(files: ModelFiles, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The generation config's ids, or the model config's where it has none, and the tokenizer's own."""
    configured = files.generation_config.get("eos_token_id", files.config.get("eos_token_id"))
    ids = [] if configured is None else configured if isinstance(configured, list) else [configured]
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return tuple(dict.fromkeys(ids))


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """Roles to tokens, from special_tokens_map.json (older models) and tokenizer_config.json (which wins)."""
    old_map = directory / "special_tokens_map.json"
    merged = {**(read_json_object(old_map) if old_map.is_file() else {}), **config}
    found: dict[str, str | list[str]] = {}
    for role in _SPECIAL_KEYS:
        if merged.get(role) is not None:
            found[role] = _token_text(role, merged[role], directory)
    extra = merged.get("additional_special_tokens") or merged.get("extra_special_tokens")
    if isinstance(extra, list):
        found["additional_special_tokens"] = [_token_text("a special token", t, directory) for t in extra]
    elif isinstance(extra, dict):  # transformers' named tokens of multimodal models
        found |= {role: _token_text(role, token, directory) for role, token in extra.items()}
    return found


def _token_text(role: str, value: Any, directory: Path) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ConfigError(f"{directory}: {role} in tokenizer_config.json is {value!r}; it must be a string")
    return text
