"""The `quantization` option: what is taken, what is refused in which words, and what ranks keep of it."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest
import torch

from moe_kernels.device import DeviceProfile
from moe_models.interfaces import ModelDescription
from moe_runtime.building import choose_kernels
from moe_runtime.cli.engine_args import add_engine_arguments
from moe_runtime.config import EngineConfig
from moe_runtime.errors import ConfigError
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.modelfiles import resolve_model
from moe_runtime.quantization import (
    WeightFormats,
    check_device,
    find_quantization,
    kept_quantization,
    weight_formats,
)
from moe_runtime.rank_spec import RankSpec
from moe_runtime.registry import resolve_target
from tests.quantized_checkpoints import FP8_CONFIG

CPU = DeviceProfile(kind="cpu", name="a CPU", total_memory=1 << 30)
GPU = DeviceProfile(kind="cuda", name="a GPU", total_memory=1 << 30, compute_capability=(9, 0))


def _stored(**changes: object) -> dict[str, Any]:
    section = {**FP8_CONFIG, **changes}
    return {"quantization_config": {key: value for key, value in section.items() if value is not None}}


@pytest.mark.parametrize(
    ("config", "asked", "found"),
    [
        ({}, None, None),
        ({"quantization_config": None}, None, None),
        ({}, "int8", "int8"),
        (_stored(), None, "fp8"),
        (_stored(), "fp8", "fp8"),
        (_stored(), "int8", "int8"),
        (_stored(fmt=None, activation_scheme=None), None, "fp8"),
        (_stored(weight_block_size=(128, 128), scale_fmt="float"), None, "fp8"),
    ],
)
def test_what_was_asked_goes_before_what_is_stored(
    config: dict[str, Any], asked: str | None, found: str | None
) -> None:
    assert find_quantization(config, asked) == found


@pytest.mark.parametrize(
    ("config", "seen"),
    [
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            "quantization_config.quant_method is 'awq'",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method is 'gptq'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method is None"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'"),
        (_stored(weight_block_size=[64, 128]), "quantization_config.weight_block_size is [64, 128]"),
        (_stored(weight_block_size=None), "quantization_config.weight_block_size is None"),
        (_stored(activation_scheme="static"), "quantization_config.activation_scheme is 'static'"),
        (_stored(fmt="e5m2"), "quantization_config.fmt is 'e5m2'"),
        (_stored(scale_fmt="ue8m0"), "quantization_config.scale_fmt is 'ue8m0'"),
        (_stored(expert_dtype="fp4"), "quantization_config.expert_dtype is 'fp4'"),
    ],
)
@pytest.mark.parametrize("asked", [None, "int8"])
def test_other_quantised_checkpoints_are_refused_in_one_line(
    config: dict[str, Any], seen: str, asked: str | None
) -> None:
    with pytest.raises(ConfigError) as caught:
        find_quantization(config, asked)
    message = str(caught.value)
    assert message.startswith(
        f"config.json: {seen}; supported are unquantised checkpoints and quant_method 'fp8'"
    )
    assert "weight_block_size [128, 128]" in message
    assert message.endswith(
        "use such a checkpoint of the model, with quantization='int8' for int8 weights on CPUs"
    )
    assert "\n" not in message


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            "awq",
            "quantization must be one of int8, fp8, got 'awq'; leave it out to keep the checkpoint's own",
        ),
        ("int-8", "got 'int-8'; did you mean 'int8'?; leave it out"),
        (8, "got 8"),
    ],
)
def test_other_values_of_the_option_are_refused(method: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        EngineConfig(quantization=method)


def test_fp8_is_not_made_of_an_unquantised_checkpoint() -> None:
    with pytest.raises(
        ConfigError, match=r"needs an FP8 checkpoint.*no quantization_config; use the model's FP8"
    ):
        find_quantization({}, "fp8")


def test_int8_is_refused_on_gpus() -> None:
    check_device("int8", "cpu")
    check_device("fp8", "cuda")
    check_device(None, "cuda")
    with pytest.raises(ConfigError, match=r"is for CPU ranks, and these would run on cuda; use device='cpu'"):
        check_device("int8", "cuda")


def test_the_command_line_has_it() -> None:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    assert parser.parse_args(["--quantization", "int8"]).quantization == "int8"
    assert parser.parse_args([]).quantization is None


@pytest.mark.parametrize(
    ("method", "device", "size", "formats"),
    [
        (None, "cpu", 128, WeightFormats()),
        ("int8", "cpu", 24, WeightFormats(linear="int8", experts="int8")),
        ("fp8", "cpu", 128, WeightFormats()),
        ("fp8", "cuda", 128, WeightFormats(experts="float8_e4m3fn")),
        ("fp8", "cuda", 512, WeightFormats(experts="float8_e4m3fn")),
        ("fp8", "cuda", 192, WeightFormats()),
    ],
)
def test_what_ranks_keep(method: str | None, device: str, size: int, formats: WeightFormats) -> None:
    assert weight_formats(kept_quantization(method, device), size) == formats


@pytest.fixture(autouse=True)
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plans say of weights does not depend on what is compiled or installed."""
    monkeypatch.setattr("moe_runtime.building.available_libraries", lambda kind, warn: frozenset())


def _spec(config: EngineConfig, **model_config: object) -> RankSpec:
    files = resolve_model(None)
    files.config.update(model_config)
    return RankSpec(
        rank=0,
        generation=0,
        config=config,
        model_files=files,
        target=resolve_target(files.config),
        placement=ExpertPlacement.contiguous(64, 4),
        ranks_on_node=4,
        index_on_node=0,
    )


FACTS = ModelDescription(
    hidden_size=256, vocab_size=99, max_position_embeddings=512, layer_types=("full_attention",), moe_layers=(0,),
    num_experts=64, num_experts_per_tok=4, moe_intermediate_size=128, shared_expert_intermediate_size=0,
    tie_word_embeddings=False,
)  # fmt: skip


def test_a_ranks_plan_says_what_its_weights_are_kept_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_RUNTIME_KERNELS", raising=False)
    int8 = choose_kernels(CPU, _spec(EngineConfig(quantization="int8")), FACTS, torch.bfloat16)
    assert (int8.linear.weights, int8.grouped_gemm.weights) == (torch.int8, torch.int8)
    assert re.search(r"^linear .*; weights in int8$", int8.describe(), re.MULTILINE)
    assert "weights in" not in next(line for line in int8.describe().splitlines() if line.startswith("norm"))

    on_cpu = choose_kernels(CPU, _spec(EngineConfig(), **_stored()), FACTS, torch.bfloat16)
    assert (on_cpu.linear.weights, on_cpu.grouped_gemm.weights) == (None, None)

    on_gpu = choose_kernels(GPU, _spec(EngineConfig(), **_stored()), FACTS, torch.bfloat16)
    assert (on_gpu.linear.weights, on_gpu.grouped_gemm.weights) == (None, torch.float8_e4m3fn)


def test_kernels_that_have_no_int8_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_RUNTIME_KERNELS", "triton")
    with pytest.raises(
        ConfigError, match=r"experts are int8, which is for CPUs; .*; change MOE_RUNTIME_KERNELS"
    ):
        choose_kernels(CPU, _spec(EngineConfig(quantization="int8")), FACTS, torch.bfloat16)
