"""Forms that begin after free text: on a small vocabulary, and in the steps of a rank."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from moe_runtime.grammar.library import load_xgrammar
from moe_runtime.grammar.matcher import TokenMatcher
from moe_runtime.request import StructuredOutputsParams
from tests.runtime.structured_rank import EOS, VOCAB, StructuredRank, compiled, demo_tokenizer, text_of

AFTER: dict[str, Any] = {"after": "</think>"}
OPENED: dict[str, Any] = {**AFTER, "after_opening": "<think>"}
PROMPT = list(range(40, 60))

FORMS: dict[str, dict[str, Any]] = {
    "json": {"json": {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}}},
    "json_object": {"json_object": True},
    "regex": {"regex": r"\{[^}]*\}"},
    "choice": {"choice": ["{}", "{ }"]},
    "grammar": {"grammar": 'root ::= "{" "}"'},
}


def _is_whole(text: str, **fields: Any) -> bool:
    matcher = load_xgrammar().GrammarMatcher(compiled(StructuredOutputsParams(**fields)))
    return bool(matcher.accept_string(text) and matcher.is_completed())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "text",
    ["</think>{}", "hm\n</think>\n\n{}", "<think>é 👍 {}<|im_end|></think\n</think>{}", "{}</think>\n{}"],
)
def test_the_form_begins_after_the_first_closing_tag(form: str, text: str) -> None:
    assert _is_whole(text, **FORMS[form], **AFTER)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "text", ["", "{}", "hm", "hm</think>", "a</think>b</think>{}", "</think>\n\n\n{}", "</think> {}"]
)
def test_nothing_else_is_whole(form: str, text: str) -> None:
    assert not _is_whole(text, **FORMS[form], **AFTER)


@pytest.mark.parametrize("form", FORMS)
def test_with_an_opening_tag_a_text_that_does_not_begin_with_it_has_the_form_throughout(form: str) -> None:
    assert _is_whole("{}", **FORMS[form], **OPENED)
    assert _is_whole("<think>{} hm</think>\n{}", **FORMS[form], **OPENED)
    for text in ("hm</think>{}", "</think>{}", "<think>", "<think>{}", "\n{}"):
        assert not _is_whole(text, **FORMS[form], **OPENED), text


def test_tags_stand_for_themselves() -> None:
    tags: dict[str, Any] = {"after": '"]\\', "after_opening": "[^a](\\"}
    assert _is_whole('[^a](\\hm"]\\{}', **FORMS["json"], **tags)


def _allowed(matcher: TokenMatcher) -> set[int]:
    words = np.zeros(VOCAB // 32, dtype=np.int32)
    matcher.fill(words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def test_all_but_special_tokens_may_be_reasoned_with_and_the_end_waits_for_the_form() -> None:
    form = StructuredOutputsParams(regex="x+", **AFTER)
    taken: list[int] = []
    matcher = TokenMatcher(compiled(form), StructuredRank().add_text("a", PROMPT).request, taken)
    anything = {token for token in range(VOCAB) if not demo_tokenizer().is_special(token)}
    assert _allowed(matcher) == anything
    taken += demo_tokenizer().encode("why? </thin", add_special_tokens=False)
    assert _allowed(matcher) == anything
    taken += demo_tokenizer().encode("k>", add_special_tokens=False)
    assert {demo_tokenizer().token(token)[0] for token in _allowed(matcher)} == {"x", "\n"}
    taken += demo_tokenizer().encode("x", add_special_tokens=False)
    assert set(EOS) < _allowed(matcher)


def _beginning(number: int) -> list[int]:
    text = f"{number} The old man looked at the sea and thought of"
    return demo_tokenizer().encode(text, add_special_tokens=False)


# The demo model's sentences end with a full stop, which closes its reasoning here.
@pytest.mark.parametrize(
    ("limits", "preempts"), [({"max_num_seqs": 16}, False), ({"max_num_seqs": 16, "blocks": 12}, True)]
)
def test_a_model_reasons_and_then_keeps_to_the_form(limits: dict[str, Any], preempts: bool) -> None:
    form = StructuredOutputsParams(regex="[A-Z]{3}!", after=".")
    rank = StructuredRank(**limits)
    texts = [
        rank.add_text(f"{i}", _beginning(i), form, seed=i, temperature=1.0, max_tokens=150, min_tokens=8)
        for i in range(8)
    ]
    rank.run()
    assert rank.failed == {}
    for text in texts:
        assert text.finish_reason == "stop", text_of(text)
        assert re.fullmatch(r"[^.]*\.\n?\n?[A-Z]{3}!", text_of(text)), text_of(text)
    assert len(set(map(text_of, texts))) == len(texts)
    assert any(len(text_of(text)) > 20 for text in texts)
    assert (sum(text.num_preemptions for text in texts) > 0) == preempts
