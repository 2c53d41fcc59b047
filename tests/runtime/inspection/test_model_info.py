"""ModelInfo: bytes a rank, what fits, and the way through JSON, on figures that are counted by hand."""

from __future__ import annotations

import dataclasses

import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.inspection import InspectionFacts, ModelInfo, TokenizerFacts
from moe_runtime.inspection.sizes import format_count, format_size, parse_size

INFO = ModelInfo(
    architecture="TinyForCausalLM",
    model_class="tiny:Tiny",
    modalities=("text",),
    layer_types=("linear_attention", "full_attention"),
    moe_layers=(0, 1),
    hidden_size=8,
    vocab_size=100,
    max_model_len=10_000,
    tie_word_embeddings=False,
    num_experts=10,
    num_experts_per_tok=3,
    moe_intermediate_size=4,
    shared_expert_intermediate_size=0,
    num_mtp_layers=1,
    dtype="bfloat16",
    quantization=None,
    parameters={"expert": 1000, "attention": 30, "linear_attention": 50, "other": 20},
    parameter_bytes={"expert": 2000, "attention": 60, "linear_attention": 100, "other": 40},
    kv_bytes_per_token=2,
    state_bytes_per_request=100,
    tokenizer=TokenizerFacts(
        vocab_size=100, has_chat_template=True, eos_token="<end>", bos_token=None, eos_token_ids=(7, 9)
    ),
    warnings=("something",),
    inspection=InspectionFacts(node="here", interpreter="/python", seconds=1.5, peak_rss_bytes=3),
)


def test_json_round_trip_is_equal() -> None:
    assert ModelInfo.from_json(INFO.to_json()) == INFO
    assert ModelInfo.from_dict(INFO.to_dict()) == INFO


def test_totals() -> None:
    assert INFO.num_parameters == 1100
    assert INFO.active_parameters == 100 + 300  # top 3 of 10 experts
    assert INFO.weight_bytes == 2200
    assert INFO.num_layers == 2
    assert list(INFO.legal_ep_sizes) == list(range(1, 11))


@pytest.mark.parametrize(
    ("ep_size", "expected"), [(1, 2200), (2, 1200), (3, 200 + 4 * 200), (4, 200 + 3 * 200), (10, 400)]
)
def test_bytes_a_rank_are_those_of_the_fullest(ep_size: int, expected: int) -> None:
    assert INFO.weight_bytes_per_rank(ep_size) == expected


@pytest.mark.parametrize(
    ("ep_size", "words"),
    [
        (11, "expert_parallel_size=11 is more than the 10 experts of TinyForCausalLM; use at most 10"),
        (0, "whole number of at least 1, got 0"),
        (True, "whole number of at least 1, got True"),
        (1.5, "whole number of at least 1, got 1.5"),
    ],
)
def test_illegal_ep_sizes_are_refused(ep_size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        INFO.weight_bytes_per_rank(ep_size)


def test_dense_model_has_one_legal_ep_size() -> None:
    dense = dataclasses.replace(
        INFO, num_experts=0, num_experts_per_tok=0, moe_layers=(), parameters={"expert": 0, "other": 20}
    )
    assert list(dense.legal_ep_sizes) == [1]
    assert dense.active_parameters == 20


def test_fit_counts_sequences_of_each_length() -> None:
    fit = INFO.fit(100_000, 2, memory_utilization=0.5)
    left = 50_000 - 1200
    assert (fit.usable_bytes, fit.weight_bytes, fit.cache_bytes) == (50_000, 1200, left)
    assert fit.sequences == ((4096, left // (100 + 2 * 4096)), (10_000, left // (100 + 2 * 10_000)))
    assert fit.max_sequence_length == 10_000  # the model's own limit
    assert fit.fits


def test_longest_sequence_is_what_is_left_after_its_state() -> None:
    fit = INFO.fit(1200 + 100 + 2 * 77 + 1, 2, memory_utilization=1.0)
    assert fit.max_sequence_length == 77
    assert fit.sequences == ((4096, 0), (10_000, 0))


def test_weights_that_do_not_fit_say_which_ep_size_would() -> None:
    fit = INFO.fit(1310, 1, memory_utilization=1.0)
    assert not fit.fits
    assert fit.max_sequence_length == 0
    assert fit.reason == "weights need 2.2 kB a rank at EP 1, 1.3 kB are usable; EP 2 or more fits"
    assert INFO.fit(1310, 2, memory_utilization=1.0).fits


def test_state_that_does_not_fit_beside_the_weights_is_named() -> None:
    reason = INFO.fit(1250, 2, memory_utilization=1.0).reason
    assert reason is not None
    assert "and one sequence 102 B more" in reason


def test_model_too_large_for_any_ep_size() -> None:
    reason = INFO.fit(300, 10, memory_utilization=1.0).reason
    assert reason is not None
    assert reason.endswith("no EP size fits; use devices with more memory")


def test_memory_utilization_outside_its_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory_utilization must be above 0 and at most 1, got 1\.5"):
        INFO.fit(10**6, 1, memory_utilization=1.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GB", 80 * 10**9),
        ("80GiB", 80 * 2**30),
        ("500MB", 500 * 10**6),
        ("1.5 T", 15 * 10**11),
        ("24g", 24 * 10**9),
        ("4096", 4096),
        ("7B", 7),
    ],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "80 GPUs", "-3GB", "0", "1e3GB", "80GBB"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--device-memory must be a number of bytes.*such as 80GB"):
        parse_size(text, "--device-memory")


def test_sizes_and_counts_are_written() -> None:
    assert [format_size(n) for n in (999, 1500, 80 * 10**9, 2 * 10**12)] == [
        "999 B",
        "1.5 kB",
        "80.0 GB",
        "2.00 TB",
    ]
    assert [format_count(n) for n in (12_345, 1_500_000, 79_670_000_000)] == ["12,345", "1.50 M", "79.67 B"]
