"""The loads of `bench serve`: prompts and arrivals have the shapes asked for, and are the same for the same seed."""

from __future__ import annotations

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.bench.serving.arrivals import arrival_times
from moe_runtime.bench.serving.prompts import Conversation, RandomLengths
from moe_runtime.bench.serving.workload import ServeWorkload
from moe_runtime.errors import ConfigError

LENGTHS = RandomLengths(input_len=40, output_len=20, range_ratio=0.5, prefix_len=8)


def _prompts(conversations: list[Conversation]) -> list[Any]:
    assert all(len(conversation.turns) == 1 for conversation in conversations)
    return [conversation.turns[0].prompt for conversation in conversations]


@pytest.mark.parametrize("dataset", ["random", "shared-prefix", "multi-turn"])
@pytest.mark.parametrize("as_ids", [True, False])
def test_the_seed_alone_decides_what_is_sent(dataset: str, as_ids: bool) -> None:
    def made(seed: int) -> list[Conversation]:
        return ServeWorkload(dataset_name=dataset, num_prompts=12, lengths=LENGTHS, seed=seed).conversations(
            as_ids=as_ids
        )

    assert made(3) == made(3)
    assert made(3) != made(4)


def test_random_prompts_have_lengths_within_the_ratio_and_one_prefix() -> None:
    workload = ServeWorkload(num_prompts=200, lengths=LENGTHS, random_vocab_size=50)
    made = workload.conversations(as_ids=True)
    prompts = _prompts(made)

    assert len(prompts) == 200
    assert {prompt[:8] for prompt in prompts} == {prompts[0][:8]}
    assert {len(prompt) - 8 for prompt in prompts} <= set(range(20, 61))
    assert {turn.output_len for conversation in made for turn in conversation.turns} <= set(range(10, 31))
    assert len({len(prompt) for prompt in prompts}) > 20
    assert {token for prompt in prompts for token in prompt} == set(range(50))
    assert all(c.turns[0].prompt_len == len(p) for c, p in zip(made, prompts, strict=True))


def test_words_are_as_many_as_ids_would_be() -> None:
    workload = ServeWorkload(num_prompts=5, lengths=RandomLengths(input_len=30, output_len=1))

    assert [len(prompt.split(" ")) for prompt in _prompts(workload.conversations(as_ids=False))] == [30] * 5


def test_prompts_of_a_group_share_their_beginning_and_no_more() -> None:
    workload = ServeWorkload(
        dataset_name="shared-prefix",
        num_prompts=30,
        shared_prefix_num_groups=3,
        shared_prefix_len=16,
        lengths=RandomLengths(input_len=8, output_len=4),
    )
    prompts = _prompts(workload.conversations(as_ids=True))

    groups = [prompt[:16] for prompt in prompts]
    assert {groups.count(group) for group in set(groups)} == {10}
    assert groups != sorted(groups, key=groups.index), "groups are mixed"
    assert len({prompt[16:] for prompt in prompts}) == 30
    assert {len(prompt) for prompt in prompts} == {24}


def test_warmups_are_not_among_the_measured_prompts() -> None:
    workload = ServeWorkload(num_prompts=20, num_warmups=20, lengths=LENGTHS)

    measured, before = _prompts(workload.conversations(as_ids=True)), _prompts(workload.warmups(as_ids=True))
    assert len(before) == 20
    assert not set(measured) & set(before)


@pytest.mark.parametrize(("given", "expected"), [(None, 5), (3, 3)])
def test_conversations_have_their_turns(given: int | None, expected: int) -> None:
    workload = ServeWorkload(
        dataset_name="multi-turn",
        num_prompts=20,
        multi_turn_num_turns=4,
        multi_turn_num_conversations=given,
        multi_turn_think_time=1.5,
        lengths=RandomLengths(input_len=6, output_len=3, prefix_len=2),
    )
    made = workload.conversations(as_ids=False)

    assert len(made) == expected
    assert all(conversation.think_time_s == 1.5 for conversation in made)
    words = [[len(str(turn.prompt).split()) for turn in conversation.turns] for conversation in made]
    assert words == [[8, 6, 6, 6]] * expected


def _file(tmp_path: Path, content: str) -> str:
    path = tmp_path / "prompts"
    path.write_text(content)
    return str(path)


def _of_file(path: str, **settings: Any) -> list[Conversation]:
    return ServeWorkload(dataset_name="file", dataset_path=path, **settings).conversations(as_ids=False)


def test_lines_of_a_file_become_requests_in_an_order_of_the_seed(tmp_path: Path) -> None:
    lines = [{"prompt": f"p{n}", "output_len": n + 1} for n in range(20)]
    path = _file(tmp_path, "\n".join(map(json.dumps, lines)) + "\n\n")
    made = _of_file(path, num_prompts=20, seed=1)

    assert sorted(_prompts(made)) == sorted(line["prompt"] for line in lines)
    assert all(f"p{c.turns[0].output_len - 1}" == c.turns[0].prompt for c in made)
    assert _prompts(made) == _prompts(_of_file(path, num_prompts=20, seed=1))
    assert _prompts(made) != _prompts(_of_file(path, num_prompts=20, seed=2))
    assert _prompts(_of_file(path, num_prompts=50, seed=1))[20:40] == _prompts(made), "it begins again"
    assert {c.turns[0].output_len for c in _of_file(path, num_prompts=3, output_len=9)} == {9}


def test_a_file_may_have_token_ids_or_messages_and_no_lengths(tmp_path: Path) -> None:
    (ids,) = _of_file(_file(tmp_path, '{"prompt": [1, 2, 3]}'), num_prompts=1)
    assert (ids.turns[0].prompt, ids.turns[0].prompt_len, ids.turns[0].output_len) == ((1, 2, 3), 3, 128)

    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = _file(tmp_path, json.dumps({"messages": messages}))
    (chat,) = _of_file(path, num_prompts=1, endpoint="/v1/chat/completions")
    assert list(chat.turns[0].prompt) == messages


def test_share_gpt_gives_first_messages_and_the_length_of_their_answers(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "one two three"}, {"value": "more"}]
    items = [{"conversations": said}, {"conversations": said[:1]}, {"conversations": []}]
    (made,) = _of_file(_file(tmp_path, json.dumps(items)), num_prompts=1)

    assert (made.turns[0].prompt, made.turns[0].output_len) == ("why?", 4)


@pytest.mark.parametrize(
    ("content", "endpoint", "words"),
    [
        ("", "/v1/completions", "has no prompts"),
        ('{"prompt": "a"}\n{', "/v1/completions", "prompts, line 2 is no JSON"),
        ('{"text": "a"}', "/v1/completions", 'wanted an object with either "prompt" or "messages"'),
        ('{"prompt": [1, "a"]}', "/v1/completions", "prompt must be text or a list of token ids"),
        ('{"prompt": "a", "output_len": 0}', "/v1/completions", "output_len must be a whole number"),
        ('{"messages": "a"}', "/v1/chat/completions", "messages must be a list of objects"),
        ('{"messages": [{"role": "user"}]}', "/v1/completions", "give --endpoint /v1/chat/completions"),
        ('{"prompt": [1, 2]}', "/v1/chat/completions", "give --endpoint /v1/completions"),
        ('[{"id": 1}]', "/v1/completions", "item 0: wanted ShareGPT's"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(
    tmp_path: Path, content: str, endpoint: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        _of_file(_file(tmp_path, content), endpoint=endpoint)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_between_arrivals_have_the_mean_and_the_variation_asked_for(burstiness: float) -> None:
    times = arrival_times(20_000, 8.0, burstiness, seed=5)
    gaps = [later - earlier for earlier, later in pairwise([0.0, *times])]

    assert min(gaps) >= 0
    assert times[-1] == pytest.approx(20_000 / 8.0)
    variation = statistics.pstdev(gaps) / statistics.fmean(gaps)
    assert variation == pytest.approx(burstiness**-0.5, rel=0.05)
    assert times == arrival_times(20_000, 8.0, burstiness, seed=5)
    assert times != arrival_times(20_000, 8.0, burstiness, seed=6)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrival_times(3, math.inf, 1.0, seed=0) == [0.0, 0.0, 0.0]
