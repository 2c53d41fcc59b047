"""Requests: every bad value is refused in one clear line, and what is accepted keeps vLLM's meaning."""

from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys

import pytest

from moe_runtime.errors import ConfigError, PromptError
from moe_runtime.request import (
    CompletionOutput,
    EngineRequest,
    OutputDelta,
    Prompt,
    RequestOutput,
    SamplingParams,
    draw_seed,
    parse_prompt,
    stop_ids,
    validate_prompt,
)


def test_defaults_are_those_of_vllm() -> None:
    assert {f.name: getattr(SamplingParams(), f.name) for f in dataclasses.fields(SamplingParams)} == {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "logit_bias": None,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "detokenize": True,
        "structured_outputs": None,
    }


BAD_VALUES = [
    ("n", 0, "n must be at least 1, got 0; it counts the completions of one prompt"),
    ("n", 1.5, "n must be a whole number, got 1.5"),
    ("n", True, "n must be a whole number, got True"),
    ("presence_penalty", 2.5, r"presence_penalty must be in \[-2, 2\], got 2.5; use 0 for no penalty"),
    ("frequency_penalty", -2.1, r"frequency_penalty must be in \[-2, 2\], got -2.1"),
    ("repetition_penalty", 0, "repetition_penalty must be greater than 0, got 0; use 1 for no penalty"),
    ("temperature", -0.1, "temperature must be at least 0, got -0.1; use 0 for greedy decoding"),
    ("temperature", math.nan, "temperature must be at least 0, got nan"),
    ("temperature", math.inf, "temperature must be finite, got inf"),
    ("temperature", "hot", "temperature must be at least 0, got 'hot'"),
    ("temperature", None, "temperature must be at least 0, got None"),
    ("top_p", 0.0, r"top_p must be in \(0, 1\], got 0.0; use 1 for all tokens"),
    ("top_p", 1.01, r"top_p must be in \(0, 1\], got 1.01"),
    ("top_k", -2, "top_k must be at least -1, got -2; use 0 or -1 for all tokens"),
    ("min_p", 1.5, r"min_p must be in \[0, 1\], got 1.5"),
    ("seed", "x", "seed must be a whole number, got 'x'"),
    ("stop", [""], r"stop must not hold an empty string, got \[''\]"),
    ("stop", [1], r"stop must be a string or a list of strings, got \[1\]"),
    ("stop", 7, "stop must be a string or a list of strings, got 7"),
    ("stop_token_ids", 5, "stop_token_ids must be a list of token ids .*, got 5"),
    ("stop_token_ids", [-1], r"stop_token_ids must be a list of token ids .*, got \[-1\]"),
    ("ignore_eos", 1, "ignore_eos must be True or False, got 1"),
    ("max_tokens", 0, "max_tokens must be at least 1, got 0; use None for as many as"),
    ("min_tokens", -1, "min_tokens must be at least 0, got -1"),
    ("min_tokens", 17, r"min_tokens \(17\) is larger than max_tokens \(16\); raise max_tokens"),
    ("logprobs", -2, "logprobs must be at least -1, got -2; use -1 for the whole vocabulary"),
    ("prompt_logprobs", "all", "prompt_logprobs must be a whole number, got 'all'"),
    ("logit_bias", [3], r"logit_bias must be a dict of token id to number, got \[3\]"),
    ("logit_bias", {"3": 1.0}, "logit_bias has key '3'; keys must be token ids"),
    ("logit_bias", {3: math.inf}, "logit_bias of token 3 must be a number below infinity, got inf"),
    ("logit_bias", {3: math.nan}, "logit_bias of token 3 must be a number below infinity, got nan"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_bad_value_is_refused_in_one_line(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match="^" + message) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)


def test_unknown_argument_is_refused_with_its_nearest_match() -> None:
    with pytest.raises(
        ConfigError, match="SamplingParams has no argument 'temprature'; did you mean 'temperature'"
    ):
        SamplingParams(temprature=0.5)
    with pytest.raises(ConfigError, match="no argument 'max_token'; did you mean 'max_tokens'"):
        dataclasses.replace(SamplingParams(), max_token=3)


def test_stop_strings_need_text() -> None:
    with pytest.raises(ConfigError, match="stop strings need detokenize=True"):
        SamplingParams(stop="x", detokenize=False)


def test_params_are_plain_immutable_data() -> None:
    params = SamplingParams(temperature=0.5, stop="end", stop_token_ids=[3], logit_bias={4: 1}, seed=-1)
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3,)
    assert params.logit_bias == {4: 1.0}
    assert params.seed is None
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, temperature=0).is_greedy
    assert not params.is_greedy
    assert "temperature=0.5" in repr(params)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0  # type: ignore[misc]


def test_generation_config_gives_defaults_and_the_caller_overrides_them() -> None:
    config = {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": None,
        "max_new_tokens": 99,
        "do_sample": False,
        "eos_token_id": [1, 2],
    }
    params = SamplingParams.from_generation_config(config, top_k=5, seed=3)
    assert params == SamplingParams(temperature=0.7, top_p=0.8, top_k=5, max_tokens=99, seed=3)
    with pytest.raises(ConfigError, match=r"^generation_config.json: top_p must be in \(0, 1\], got 2"):
        SamplingParams.from_generation_config({"top_p": 2})
    with pytest.raises(ConfigError, match="no argument 'topk'; did you mean 'top_k'"):
        SamplingParams.from_generation_config(config, topk=5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hello", Prompt("hello", None)),
        ([3, 4], Prompt(None, (3, 4))),
        ({"prompt": "hello"}, Prompt("hello", None)),
        ({"prompt_token_ids": [3, 4]}, Prompt(None, (3, 4))),
        ({"prompt": "hello", "prompt_token_ids": [3]}, Prompt("hello", (3,))),
    ],
)
def test_prompt_shapes(given: object, expected: Prompt) -> None:
    assert parse_prompt(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "a prompt must be a string, a list of token ids, .* got int 5"),
        (None, "a prompt must be .* got NoneType None"),
        ({}, "a prompt must be .* got {}"),
        ({"prompt": [1]}, r'"prompt" must be a string, got \[1\]; token ids go into "prompt_token_ids"'),
        ({"prompt_token_ids": "ab"}, "\"prompt_token_ids\" must be a list of token ids, got 'ab'"),
        ({"promt": "hello"}, "a prompt has no key 'promt'; did you mean 'prompt'"),
        ([1, "a"], "token ids must be integers, got 'a' at index 1"),
        ([1, True], "token ids must be integers, got True at index 1"),
    ],
)
def test_bad_prompt_shapes(given: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        parse_prompt(given)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "the prompt is empty"),
        ([1] * 8, "the prompt has 8 tokens, but the model's length is 8 .* shorten it to 7 tokens"),
        ([1, 2, 100], r"token id 100 at index 2, outside the vocabulary of 100 \(0 to 99\)"),
        ([1, -3, 100], "token id -3 at index 1"),
    ],
)
def test_prompts_that_the_model_cannot_serve(token_ids: list[int], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        validate_prompt(token_ids, 100, 8, SamplingParams())


def test_prompt_may_leave_room_for_just_one_token() -> None:
    validate_prompt([0, 99, 1, 2, 3, 4, 5], 100, 8, SamplingParams(max_tokens=100))


def test_logit_bias_must_fit_the_vocabulary_and_leave_a_token() -> None:
    with pytest.raises(ConfigError, match="logit_bias has token id 4, outside the vocabulary of 4"):
        validate_prompt([0], 4, 8, SamplingParams(logit_bias={4: 1.0}))
    only_token_3 = dict.fromkeys(range(3), -math.inf)
    validate_prompt([0], 4, 8, SamplingParams(logit_bias=only_token_3), eos_token_ids=[3])
    with pytest.raises(ConfigError, match="logit_bias and min_tokens forbid all 4 tokens"):
        validate_prompt([0], 4, 8, SamplingParams(logit_bias=only_token_3, min_tokens=1), eos_token_ids=[3])


def test_stop_ids_join_both_kinds_unless_eos_is_ignored() -> None:
    assert stop_ids(SamplingParams(stop_token_ids=[3]), (1, 2)) == {1, 2, 3}
    assert stop_ids(SamplingParams(stop_token_ids=[3], ignore_eos=True), (1, 2)) == {3}


def test_what_driver_and_rank_exchange_survives_pickling() -> None:
    request = EngineRequest(
        request_id="a", sample_index=1, prompt_token_ids=(1, 2), params=SamplingParams(stop="x"), seed=5
    )
    assert pickle.loads(pickle.dumps(request)) == request
    assert request.key == ("a", 1)
    delta = OutputDelta(request_id="a", sample_index=1, new_token_ids=(4,), text="hi", finish_reason="stop")
    assert pickle.loads(pickle.dumps(delta)) == delta


def test_output_has_the_shape_of_vllm() -> None:
    completion = CompletionOutput(index=0, text="hi", token_ids=[4], finish_reason="length")
    output = RequestOutput(request_id="a", prompt="p", prompt_token_ids=[1], outputs=[completion])
    assert output.outputs[0].text == "hi"
    assert output.outputs[0].finished
    assert not output.finished
    assert output.prompt_logprobs is None


def test_drawn_seeds_differ_and_fit_63_bits() -> None:
    seeds = {draw_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_requests_and_scheduler_import_no_torch() -> None:
    modules = "moe_runtime.request, moe_runtime.scheduler, moe_runtime.cache.sizing"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
