"""LLM as a Python programmer uses it, on the demo checkpoint with two ranks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

import pytest

from moe_runtime import LLM, SamplingParams
from moe_runtime.errors import ConfigError, EngineDeadError, MoeRuntimeError, PromptError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

# float32, so that results can be compared between batches and layouts.
SETTINGS = {"dtype": "float32", "use_tqdm": False}


@pytest.fixture(scope="module")
def llm(ray_session: None) -> Iterator[LLM]:
    with LLM(expert_parallel_size=2, **SETTINGS) as started:
        yield started


def _prompts(count: int) -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(1000) for _ in range(draw.randint(1, 30))] for _ in range(count)]


def test_outputs_come_in_the_prompts_order_with_text_and_tokens(llm: LLM) -> None:
    prompts = ["The experts", {"prompt": "of this"}, {"prompt_token_ids": [5, 6, 7]}, [8, 9]]
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False
    )
    assert [output.prompt for output in outputs] == ["The experts", "of this", None, None]
    assert outputs[2].prompt_token_ids == [5, 6, 7]
    tokenizer = llm.get_tokenizer()
    for output in outputs:
        (completion,) = output.outputs
        assert output.finished
        assert len(completion.token_ids) == 4
        assert completion.text == tokenizer.decode(completion.token_ids)
        assert (completion.finish_reason, completion.logprobs) == ("length", None)


def test_one_prompt_alone_gives_a_list_of_one(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2)
    for prompt in ("hello", [1, 2, 3], {"prompt_token_ids": [1, 2, 3]}):
        assert len(llm.generate(prompt, params, use_tqdm=False)) == 1
    assert llm.generate([], params, use_tqdm=False) == []


def test_defaults_come_from_the_generation_config(llm: LLM) -> None:
    config = llm.files.generation_config
    defaults = llm.get_default_sampling_params()
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (
        config["temperature"],
        config["top_p"],
        config["top_k"],
    )
    assert len(llm.generate("hello", use_tqdm=False)[0].outputs[0].token_ids) <= defaults.max_tokens


def test_samples_depend_on_seed_and_index_but_not_on_batch_or_ranks(llm: LLM) -> None:
    prompts = _prompts(5)
    params = [
        SamplingParams(temperature=1.5, top_p=0.95, top_k=200, seed=seed, n=2, max_tokens=12, ignore_eos=True)
        for seed in range(5)
    ]

    def tokens(generating: LLM, which: list[int]) -> list[list[list[int]]]:
        outputs = generating.generate([prompts[i] for i in which], [params[i] for i in which], use_tqdm=False)
        return [[completion.token_ids for completion in output.outputs] for output in outputs]

    together = tokens(llm, [0, 1, 2, 3, 4])
    assert together[0][0] != together[0][1]
    assert tokens(llm, [3, 1]) == [together[3], together[1]]
    with LLM(expert_parallel_size=1, max_num_batched_tokens=8, max_num_seqs=3, **SETTINGS) as other:
        assert tokens(other, [0, 1, 2, 3, 4]) == together


def test_stop_strings_and_stop_tokens_end_the_output(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    (plain,) = llm.generate("The experts", greedy, use_tqdm=False)
    text, ids = plain.outputs[0].text, plain.outputs[0].token_ids
    stop = text[9:12]
    at = text.index(stop)

    def run(**changes: object) -> tuple[str, list[int], str | None, int | str | None]:
        (output,) = llm.generate("The experts", dataclasses.replace(greedy, **changes), use_tqdm=False)
        completion = output.outputs[0]
        return completion.text, completion.token_ids, completion.finish_reason, completion.stop_reason

    stopped, stopped_ids, *reasons = run(stop=[stop])
    assert (stopped, reasons) == (text[:at], ["stop", stop])
    assert stopped_ids == ids[: len(stopped_ids)]
    assert run(stop=[stop], include_stop_str_in_output=True)[0] == text[: at + len(stop)]
    first = ids.index(ids[5])
    assert run(stop_token_ids=[ids[5]])[1:] == (ids[: first + 1], "stop", ids[5])
    assert run(ignore_eos=False, max_tokens=3)[1] == ids[:3]


def test_logprobs_are_reported_for_chosen_and_best_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (output,) = llm.generate("The experts", params, use_tqdm=False)
    (completion,) = output.outputs
    assert len(completion.logprobs) == 3
    for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
        assert logprobs[token].rank == 1
        assert len(logprobs) == 2
        assert logprobs[token].decoded_token == llm.get_tokenizer().token(token)
    chosen = [
        row[token].logprob for token, row in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    assert completion.cumulative_logprob == pytest.approx(sum(chosen))
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token, row in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert token in row


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    tokenizer = llm.get_tokenizer()
    rendered = tokenizer.apply_chat_template(messages)
    assert output.prompt == rendered
    assert output.prompt_token_ids == tokenizer.encode(rendered, add_special_tokens=False)
    outputs = llm.chat([messages, messages], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [output.outputs[0].token_ids] * 2


def test_streamed_pieces_add_up_to_the_whole(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    (whole,) = llm.generate("The experts", params, use_tqdm=False)
    pieces = list(llm.stream("The experts", params))
    assert "".join(piece.text for piece in pieces) == whole.outputs[0].text
    assert [token for piece in pieces for token in piece.new_token_ids] == whole.outputs[0].token_ids
    assert pieces[-1].finish_reason == "length"


def test_streams_of_several_prompts_come_mixed_and_whole(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = ["The experts", "Once there was", "a"]
    whole = llm.generate(prompts, params, use_tqdm=False)
    tokens: dict[str, list[int]] = {}
    for piece in llm.stream(prompts, params):
        tokens.setdefault(piece.request_id, []).extend(piece.new_token_ids)
    assert sorted(tokens.values()) == sorted(list(output.outputs[0].token_ids) for output in whole)


def test_a_stream_that_is_left_half_way_leaves_the_deployment_usable(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5000, ignore_eos=True)
    for _ in llm.stream("The experts", params):
        break
    short = dataclasses.replace(params, max_tokens=3)
    assert len(llm.generate("again", short, use_tqdm=False)[0].outputs[0].token_ids) == 3


def test_ranks_report_what_they_are(llm: LLM) -> None:
    assert [report.rank for report in llm.ranks] == [0, 1]
    assert [report.num_local_experts for report in llm.ranks] == [16, 16]
    assert all(report.kernel_plan and report.weight_bytes and report.cache_bytes for report in llm.ranks)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "the prompt is empty"),
        ([1, 5000], "outside the vocabulary of 4096"),
        ([1] * 9000, "has 9000 tokens"),
    ],
)
def test_bad_prompts_are_refused_and_the_deployment_lives_on(llm: LLM, prompt: object, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        llm.generate([prompt], use_tqdm=False)
    assert llm.generate("fine", SamplingParams(max_tokens=1), use_tqdm=False)[0].finished


def test_requests_at_the_limits_give_back_all_that_they_held(llm: LLM) -> None:
    length = llm.ranks[0].max_model_len
    longest = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (full,) = llm.generate([[7] * (length - 1)], longest, use_tqdm=False)
    assert len(full.outputs[0].token_ids) == 1
    assert full.outputs[0].finish_reason == "length"
    (one,) = llm.generate([[7, 8]], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    assert len(one.outputs[0].token_ids) == 1
    for stats in llm.stats:
        held = ("num_running", "num_waiting", "blocks_used", "slots_used")
        assert [stats.scheduler[name] for name in held] == [0, 0, 0, 0]


def test_a_second_request_skips_the_prefix_that_it_shares(llm: LLM) -> None:
    def counted(prompt: list[int]) -> tuple[int, list[int]]:
        before = [stats.loop["prompt_tokens"] for stats in llm.stats]
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        after = [stats.loop["prompt_tokens"] for stats in llm.stats]
        return int(sum(after) - sum(before)), output.outputs[0].token_ids

    draw = random.Random(5)
    shared = [draw.randrange(1000) for _ in range(1024)]
    first, second = [*shared, 1, 2, 3], [*shared, 4, 5]
    assert counted(first)[0] == 1027
    computed, tokens = counted(second)
    assert computed <= 128 + 2
    with LLM(expert_parallel_size=1, enable_prefix_caching=False, **SETTINGS) as uncached:
        (output,) = uncached.generate(
            [second], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False
        )
    assert tokens == output.outputs[0].token_ids


def test_unknown_arguments_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="'expert_paralel_size'; did you mean 'expert_parallel_size'"):
        LLM(expert_paralel_size=2)


def test_after_shutdown_there_is_a_clear_error() -> None:
    llm = LLM(**SETTINGS)
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(EngineDeadError) as caught:
        llm.generate("x", use_tqdm=False)
    assert isinstance(caught.value, MoeRuntimeError)
