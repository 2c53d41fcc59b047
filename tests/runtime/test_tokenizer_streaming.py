"""Streaming: deltas add up to the whole text, characters stay whole, stop strings are found across tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_runtime.modelfiles import resolve_model
from moe_runtime.tokenizer import IncrementalDetokenizer, StopChecker, Tokenizer, load_tokenizer
from tests.runtime.test_tokenizer import sentencepiece_style

REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer(resolve_model(None))


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece_style().save(str(directory / "tokenizer.json"))
    return load_tokenizer(dataclasses.replace(resolve_model(None), path=directory, tokenizer_config={}))


def _deltas(
    tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), skip: bool = True
) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer, prompt, skip)
    return [*(stream.append(i) for i in ids), stream.flush()]


# --------------------------------------------------------------------------- byte-level tokenizers


@given(st.text(max_size=40), st.text(max_size=10))
@settings(deadline=None)
def test_any_text_streams_whole(demo: Tokenizer, text: str, prompt: str) -> None:
    deltas = _deltas(demo, demo.encode(text), demo.encode(prompt), skip=False)
    assert "".join(deltas) == text
    assert REPLACEMENT in text or not any(REPLACEMENT in delta for delta in deltas)


@given(st.lists(st.integers(0, 1030), max_size=60), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_ids_stream_to_what_decode_gives(demo: Tokenizer, ids: list[int], skip: bool) -> None:
    assert "".join(_deltas(demo, ids, skip=skip)) == demo.decode(ids, skip)


@given(st.binary(max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_bytes_stream_to_what_decode_gives(demo: Tokenizer, data: bytes) -> None:
    of_byte = {demo.token_bytes(i): i for i in range(3, 259)}
    ids = [of_byte[bytes([byte])] for byte in data]
    assert "".join(_deltas(demo, ids)) == demo.decode(ids) == data.decode(errors="replace")


def test_half_a_character_waits(demo: Tokenizer) -> None:
    ids = demo.encode("👍a")
    assert len(ids) == 5
    assert _deltas(demo, ids) == ["", "", "", "👍", "a", ""]
    assert _deltas(demo, ids[:2]) == ["", "", REPLACEMENT]  # the end came first


def test_leading_space_of_the_first_token_stays(demo: Tokenizer) -> None:
    assert _deltas(demo, demo.encode(" the of"), demo.encode("prompt")) == [" the", " of", ""]


def test_special_tokens_are_skipped_or_shown(demo: Tokenizer) -> None:
    ids = demo.encode("a<|im_end|>b")
    assert "".join(_deltas(demo, ids)) == "ab"
    assert "".join(_deltas(demo, ids, skip=False)) == "a<|im_end|>b"


# --------------------------------------------------------------------------- other tokenizers


@given(st.text(alphabet="abcdehlorw, é日👍", max_size=30), st.text(alphabet="abc w日👍", max_size=20))
@example("日👍éé", "")  # more bytes than the context's tokens, which must not begin inside of 日
@settings(deadline=None)
def test_sentencepiece_text_streams_whole(llama_like: Tokenizer, text: str, prompt: str) -> None:
    prompt_ids = llama_like.encode(prompt)
    both = [*prompt_ids, *llama_like.encode(text, False)]
    whole = llama_like.decode(both)
    deltas = _deltas(llama_like, both[len(prompt_ids) :], prompt_ids)
    assert llama_like.decode(prompt_ids) + "".join(deltas) == whole
    assert not any(REPLACEMENT in delta for delta in deltas)


def test_sentencepiece_words_keep_their_space_after_a_prompt(llama_like: Tokenizer) -> None:
    ids = llama_like.encode("a world", False)
    assert "".join(_deltas(llama_like, ids, llama_like.encode("a"))) == " a world"
    assert "".join(_deltas(llama_like, ids)) == "a world"


def test_endless_broken_bytes_do_not_wait_for_ever(llama_like: Tokenizer) -> None:
    broken = llama_like.token_to_id("<0xFF>")
    assert broken is not None
    stream = IncrementalDetokenizer(llama_like, [])
    shown = [stream.append(broken) for _ in range(100)]
    assert len("".join(shown)) >= 90
    assert len("".join(shown) + stream.flush()) == 100


def test_work_a_token_does_not_grow(llama_like: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = Tokenizer.decode

    def counting(self: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        sizes.append(len(ids))
        return real(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    _deltas(llama_like, llama_like.encode("hello world " * 50, False), llama_like.encode("a" * 500))
    assert max(sizes) <= 16


# --------------------------------------------------------------------------- stop strings


def _run(stop: Sequence[str], pieces: Sequence[str], include: bool = False) -> tuple[list[str], str | None]:
    checker = StopChecker(stop, include)
    shown = [checker.append(piece) for piece in pieces]
    return [*shown, checker.flush()], checker.stopped_by


def _first_to_end(text: str, stop: Sequence[str]) -> tuple[int, int] | None:
    """Where the whole text holds the stop string that is complete first, the longest of equals."""
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return min(found, default=None)


def _split(text: str, cuts: Sequence[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


@given(
    st.text(alphabet="ab#é", max_size=40),
    st.lists(st.text(alphabet="ab#é", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 1000), max_size=12),
    st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_are_found_where_the_whole_text_has_them(
    text: str, stop: list[str], cuts: list[int], include: bool
) -> None:
    shown, stopped_by = _run(stop, _split(text, cuts), include)
    first = _first_to_end(text, stop)
    if first is None:
        assert ("".join(shown), stopped_by) == (text, None)
        return
    end, start = first
    assert stopped_by == text[start:end]
    assert "".join(shown) == text[: end if include else start]


@given(
    st.text(alphabet="ab#", max_size=30),
    st.lists(st.text(alphabet="ab#", min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.integers(0, 1000), max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_no_more_is_held_back_than_may_start_a_stop_string(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    checker, seen, shown = StopChecker(stop), "", ""
    for piece in _split(text, cuts):
        seen, shown = seen + piece, shown + checker.append(piece)
        if checker.stopped_by is not None:
            return
        starts = {s[:n] for s in stop for n in range(1, len(s))}
        longest = max((len(start) for start in starts if seen.endswith(start)), default=0)
        assert shown == seen[: len(seen) - longest]


def test_stop_string_across_tokens() -> None:
    shown, stopped_by = _run(["\nUser:"], ["Yes", ".\n", "Us", "er", ": more", "later"])
    assert shown == ["Yes", ".", "", "", "", "", ""]
    assert stopped_by == "\nUser:"


def test_held_text_comes_out_when_it_was_no_stop_string() -> None:
    assert _run(["abc"], ["xa", "b", "d"])[0] == ["x", "", "abd", ""]
    assert _run(["abc"], ["xa", "b"])[0] == ["x", "", "ab"]


def test_included_stop_string_ends_the_text() -> None:
    assert _run(["END"], ["the E", "ND of it"], include=True) == (["the ", "END", ""], "END")


def test_of_two_that_end_together_the_longer_counts() -> None:
    assert _run(["c", "abc"], ["xabcd"]) == (["x", ""], "abc")


def test_text_passes_at_once_without_stop_strings() -> None:
    assert _run([], ["a", "", "b"]) == (["a", "", "b", ""], None)


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    checker = StopChecker(["stop", "abcd", "c"])
    assert checker.append("stop ", check=False) == "stop "
    assert checker.append("abc", check=False) == ""  # may be the start of "abcd", and "c" came too early
    assert checker.append("x") == "abcx"
    assert checker.append("sto", check=False) == ""
    assert checker.append("p it") == ""  # ends in text that counts
    assert checker.stopped_by == "stop"
    assert checker.append("more") == checker.flush() == ""
