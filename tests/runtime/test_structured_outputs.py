"""Structured texts of a model with random weights: what conforms was forced to, and nothing else changes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest

from moe_runtime.grammar.matcher import TokenMatcher
from moe_runtime.request import StructuredOutputsParams
from moe_runtime.scheduler import Sequence
from tests.runtime.structured_rank import EOS, VOCAB, StructuredRank, compiled, demo_tokenizer, text_of

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "salt"]}, "maxItems": 2},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "likes", "home"],
    "$defs": {"place": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}},
}
SUM = 'root ::= "=" term ("+" term)? ";"\nterm ::= [0-9] | "(" term "+" term ")"\n'


def _is_sum(text: str) -> bool:
    """Whether a text is of the grammar SUM: brackets are reduced from within."""
    inner = re.fullmatch(r"=([0-9+()]*);", text)
    reduced = inner[1] if inner else "no"
    while (shorter := re.sub(r"\([0-9]\+[0-9]\)", "0", reduced)) != reduced:
        reduced = shorter
    return re.fullmatch(r"[0-9](\+[0-9])?", reduced) is not None


def _is_person(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


KINDS: dict[str, tuple[StructuredOutputsParams, Callable[[str], bool]]] = {
    "json": (StructuredOutputsParams(json=PERSON, disable_any_whitespace=True), _is_person),
    "regex": (
        StructuredOutputsParams(regex=r"[A-Z][a-z]{1,5}@.{2}\.(org|com)"),
        lambda text: re.fullmatch(r"[A-Z][a-z]{1,5}@.{2}\.(org|com)", text) is not None,
    ),
    "choice": (
        StructuredOutputsParams(choice=["yes", "no", 'a "quoted\\" line\nand é👍']),
        lambda text: text in ("yes", "no", 'a "quoted\\" line\nand é👍'),
    ),
    "grammar": (StructuredOutputsParams(grammar=SUM), _is_sum),
    "json_object": (
        StructuredOutputsParams(json_object=True, disable_any_whitespace=True),
        lambda text: isinstance(json.loads(text), dict),
    ),
}
# The model writes no JSON, so it rarely ends a string, a number or a list by itself; a string may hold the brackets.
CLOSERS = {
    "logit_bias": {demo_tokenizer().token_to_id(char): 16.0 if char == '"' else 12.0 for char in '"]});'}
}
PROMPT = list(range(40, 60))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_conforms_and_stops(kind: str, temperature: float) -> None:
    structured, conforms = KINDS[kind]
    rank = StructuredRank()
    texts = [
        rank.add_text(
            f"{seed}", PROMPT, structured, seed=seed, temperature=temperature, max_tokens=200, **CLOSERS
        )
        for seed in range(4)
    ]
    rank.run()
    assert rank.failed == {}
    for sequence in texts:
        assert (sequence.finish_reason, sequence.stop_reason) == ("stop", None), text_of(sequence)
        assert sequence.output_ids[-1] in EOS
        assert conforms(text_of(sequence)), text_of(sequence)


def test_samples_of_one_request_each_follow_the_grammar_their_own_way() -> None:
    structured, conforms = KINDS["grammar"]
    rank = StructuredRank()
    samples = [rank.add_text("two", PROMPT, structured, sample=i, temperature=1.5) for i in range(4)]
    rank.run()
    texts = [text_of(sample) for sample in samples if sample.finish_reason == "stop"]
    assert all(map(conforms, texts))
    assert len(set(texts)) > 1


def _mixed(rank: StructuredRank) -> dict[str, Sequence]:
    found = {}
    for seed, (name, (structured, _)) in enumerate(KINDS.items()):
        rest = {"temperature": 0.8 * (seed % 2), "max_tokens": 40, "top_p": 0.9, "repetition_penalty": 1.2}
        found[name] = rank.add_text(name, [seed + 5, *PROMPT], structured, seed=seed, **rest)
        found[f"free {name}"] = rank.add_text(f"free {name}", [seed + 9, *PROMPT], seed=seed, **rest)
    return found


def _alone(name: str) -> list[int]:
    rank = StructuredRank()
    kept = _mixed(rank)[name]
    for other in list(KINDS) + [f"free {kind}" for kind in KINDS]:
        if other != name:
            rank.scheduler.abort(other)
    rank.run()
    return kept.output_ids


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    return {name: _alone(name) for name in [*KINDS, *(f"free {kind}" for kind in KINDS)]}


@pytest.mark.parametrize(
    ("limits", "preempts"),
    [
        ({"max_num_seqs": 16}, False),
        ({"max_num_seqs": 3, "max_num_batched_tokens": 7}, False),
        ({"max_num_seqs": 16, "blocks": 11}, True),
    ],
    ids=["one batch", "small steps", "preempted"],
)
def test_tokens_are_those_of_the_request_alone(
    limits: dict[str, Any], preempts: bool, alone: dict[str, list[int]]
) -> None:
    rank = StructuredRank(**limits)
    sequences = _mixed(rank)
    rank.run()
    assert {name: sequence.output_ids for name, sequence in sequences.items()} == alone
    assert (sum(s.num_preemptions for s in sequences.values() if s.matcher) > 0) == preempts


def test_a_request_that_starts_with_tokens_from_before_goes_on_from_there() -> None:
    structured, _ = KINDS["json"]
    rank = StructuredRank()
    whole = rank.add_text("whole", PROMPT, structured)
    rank.run()
    emitted = whole.output_ids[:7]
    fresh = TokenMatcher(compiled(structured), whole.request, emitted)
    followed = TokenMatcher(compiled(structured), whole.request, grown := [])
    for token in emitted:
        _mask(followed)
        grown.append(token)
    assert _mask(fresh) == _mask(followed)
    assert whole.output_ids[7] in _mask(fresh)


def _mask(matcher: TokenMatcher) -> set[int]:
    words = np.zeros(VOCAB // 32, dtype=np.int32)
    matcher.fill(words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


# --------------------------------------------------------------------------- where a text ends

SIGNS = StructuredOutputsParams(regex="[|^]{2,6}")  # no token of the vocabulary holds two of them


@pytest.mark.parametrize(
    ("params", "length"),
    [
        ({}, 2),  # the bias ends it as soon as the grammar lets it
        ({"min_tokens": 5}, 5),
        ({"min_tokens": 20}, 6),  # the grammar wins: it ends although there are fewer
        ({"ignore_eos": True}, 6),
    ],
    ids=str,
)
def test_a_text_ends_early_only_where_the_parameters_let_it_and_late_never(
    params: dict[str, Any], length: int
) -> None:
    rank = StructuredRank()
    bias = dict.fromkeys(EOS, 100.0)
    text = rank.add_text("a", PROMPT, SIGNS, logit_bias=bias, max_tokens=30, **params)
    rank.run()
    assert (text.finish_reason, text.stop_reason) == ("stop", None)
    assert len(text_of(text)) == length


def test_a_stop_token_of_the_request_cuts_the_text_and_ends_one_where_nothing_else_does() -> None:
    a = demo_tokenizer().token_to_id("a")
    rank = StructuredRank()
    cut = rank.add_text("cut", PROMPT, StructuredOutputsParams(regex="ba{40}"), stop_token_ids=[a])
    own = rank.add_text("own", PROMPT, StructuredOutputsParams(regex="b"), stop_token_ids=[a], eos=())
    rank.run()
    assert (cut.finish_reason, cut.stop_reason) == ("stop", a)
    assert (own.finish_reason, own.stop_reason, text_of(own)) == ("stop", a, "ba")


def test_max_tokens_leaves_a_text_unfinished() -> None:
    rank = StructuredRank()
    text = rank.add_text("a", PROMPT, StructuredOutputsParams(regex="a{40}"), max_tokens=3)
    rank.run()
    assert text.finish_reason == "length"
    assert set(text_of(text)) == {"a"}


# --------------------------------------------------------------------------- what fails, fails alone


def test_a_text_that_logit_bias_forbids_fails_alone(alone: dict[str, list[int]]) -> None:
    rank = StructuredRank(max_num_seqs=16)
    others = _mixed(rank)
    bias = {token: -math.inf for token in range(VOCAB) if "b" in demo_tokenizer().token(token)}
    doomed = [
        rank.add_text(f"{t}", PROMPT, StructuredOutputsParams(regex="aab"), temperature=t, logit_bias=bias)
        for t in (0.0, 1.5)
    ]
    rank.run()
    assert set(rank.failed) == set(doomed)
    assert all("logit_bias leave no token" in str(error) for error in rank.failed.values())
    assert {name: sequence.output_ids for name, sequence in others.items()} == alone
    assert rank.scheduler.stats.slots_used == rank.scheduler.stats.blocks_used == 0


def test_a_grammar_that_leads_nowhere_fails_alone(alone: dict[str, list[int]]) -> None:
    rank = StructuredRank(max_num_seqs=16)
    others = _mixed(rank)
    doomed = rank.add_text("doomed", PROMPT, StructuredOutputsParams(grammar='root ::= "a" b\nb ::= "c" b b'))
    rank.add_text("nowhere", PROMPT, StructuredOutputsParams(grammar="root ::= root"))
    rank.run()
    (failed,) = [sequence for sequence in rank.failed if sequence is not doomed]
    assert "allows no token of the vocabulary after 0 of the output" in str(rank.failed[failed])
    assert doomed.finish_reason == "length"
    assert {name: sequence.output_ids for name, sequence in others.items()} == alone


def test_special_tokens_stand_for_no_text() -> None:
    anything = TokenMatcher(
        compiled(StructuredOutputsParams(regex="[^x]*")),
        StructuredRank().add_text("a", PROMPT).request,
        [],
    )
    special = {token for token in range(VOCAB) if demo_tokenizer().is_special(token)}
    assert special
    assert _mask(anything) & special == set(EOS)
