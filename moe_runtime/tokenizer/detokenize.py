"""Token ids to text, one token at a time, without ever showing half a character."""

from __future__ import annotations

from collections.abc import Sequence
from encodings.utf_8 import IncrementalDecoder as Utf8Decoder

from moe_runtime.tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6  # tokens before the new one that its text may depend on
_MAX_HELD_TOKENS = 8  # a character has at most 4 bytes; more held tokens than this are not one character


class IncrementalDetokenizer:
    """The text of a growing sequence of tokens. The deltas together are the text of the whole, in linear time.

    A byte-level tokenizer's text is decoded from bytes as they come, so the deltas are exactly
    `tokenizer.decode` of the generated tokens. For others a window of a few tokens is decoded at each step,
    and the prompt decides whether a word at the start is set off by a space.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._whole_texts = tokenizer.whole_texts[skip_special_tokens]
        self._utf8 = Utf8Decoder(errors="replace")
        self._prompt_end = prompt_ids[-_CONTEXT_TOKENS - _MAX_HELD_TOKENS :]
        self._window: list[int] = []  # tokens decoded together in the general case
        self._num_shown = 0  # of them, those whose text has been given out
        self._boundaries: list[int] = []  # positions in the window that are inside of no character

    def append(self, token_id: int) -> str:
        """Take one more token; the text that it completes, often "" in the middle of a character."""
        text = self._whole_texts.get(token_id)
        if text is not None and not self._utf8.buffer:
            return text
        as_bytes = self._tokenizer.token_bytes(token_id, self._skip_special_tokens)
        if as_bytes is not None:
            between_characters = not self._utf8.buffer
            text = self._utf8.decode(as_bytes)
            if between_characters and not self._utf8.buffer:
                self._whole_texts[token_id] = text
            return text
        if not self._boundaries:
            self._window = self._context()
            self._num_shown = len(self._window)
            self._boundaries = [0, self._num_shown]
        self._window.append(token_id)
        return self._window_delta(final=False)

    def flush(self) -> str:
        """What was held back; call it once, after the last token."""
        return self._utf8.decode(b"", final=True) + self._window_delta(final=True)

    def _window_delta(self, *, final: bool) -> str:
        if self._num_shown == len(self._window):
            return ""
        shown = self._decode(self._window[: self._num_shown])
        whole = self._decode(self._window)
        held_tokens = len(self._window) - self._num_shown
        if whole.endswith(_REPLACEMENT) and held_tokens <= _MAX_HELD_TOKENS and not final:
            return ""
        # The window moves on by whole deltas, so that it never starts inside a character.
        start = max(b for b in self._boundaries if b <= max(0, self._num_shown - _CONTEXT_TOKENS))
        self._window = self._window[start:]
        self._num_shown = len(self._window)
        self._boundaries = [*(b - start for b in self._boundaries if b >= start), self._num_shown]
        return whole[len(shown) :]

    def _context(self) -> list[int]:
        """The prompt's last tokens, from the beginning of a character if there is one within reach."""
        for num_tokens in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + _MAX_HELD_TOKENS):
            tokens = list(self._prompt_end[-num_tokens:])
            if not self._decode(tokens).startswith(_REPLACEMENT):
                return tokens
        return list(self._prompt_end[-_CONTEXT_TOKENS:])

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)
