"""Quantised weights in one process: log-probabilities against transformers, shards, sizes, broken checkpoints."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from moe_kernels.select import KernelPlan
from moe_models.interfaces import ExpertShard
from moe_models.qwen3_next import Qwen3NextForCausalLM
from moe_runtime.building import build_model, describe_model
from moe_runtime.errors import CheckpointError
from moe_runtime.modelfiles import resolve_model
from moe_runtime.quantization import find_quantization, kept_quantization, weight_formats
from moe_runtime.registry import resolve_target
from moe_runtime.weights import quantized
from moe_runtime.weights.index import read_index
from moe_runtime.weights.load import LoadReport, load_weights
from moe_runtime.weights.plan import plan_load
from tests.checkpoints import VARIANTS, load_reference, make_checkpoint, reference_logprobs, to_fused_layout
from tests.models.model_harness import Harness
from tests.quantized_checkpoints import LARGE_ENOUGH, rounded_fp8, rounded_int8, to_fp8


def build(
    path: Path,
    quantization: str | None = None,
    *,
    device: str = "cpu",
    local: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Qwen3NextForCausalLM:
    """The model as a rank on `device` builds it, in plain torch on this CPU, its parameters full of rubbish."""
    files = resolve_model(path)
    target = resolve_target(files.config)
    facts = describe_model(target, files)
    kept = kept_quantization(find_quantization(files.config, quantization), device)
    plan = KernelPlan.reference().with_weights(**weight_formats(kept, facts.moe_intermediate_size).dtypes())
    shard = ExpertShard(facts.num_experts, local or tuple(range(facts.num_experts)))
    model = build_model(target, files, shard, plan, dtype, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-128 if parameter.dtype == torch.int8 else torch.nan)
    assert isinstance(model, Qwen3NextForCausalLM)
    return model


def load(
    path: Path, quantization: str | None = None, **where: Any
) -> tuple[Qwen3NextForCausalLM, LoadReport]:
    model = build(path, quantization, **where)
    index = read_index(resolve_model(path))
    return model, load_weights(model, model.weight_map(index.__contains__), index)


def check_against_transformers(model: Qwen3NextForCausalLM, values: Path) -> None:
    """Two sequences in one batch, then one more token each."""
    draw = random.Random(5)
    prompts = [[draw.randrange(model.config.vocab_size) for _ in range(length)] for length in (70, 9)]
    reference = load_reference(values)
    harness = Harness(model)
    first = harness.step({str(i): prompt[:-1] for i, prompt in enumerate(prompts)})
    last = harness.step({str(i): prompt[-1:] for i, prompt in enumerate(prompts)})
    for i, prompt in enumerate(prompts):
        found = torch.cat([first[str(i)], last[str(i)]])
        assert (found - reference_logprobs(reference, prompt)).abs().max() <= 1e-4


# --------------------------------------------------------------------------- the same numbers as transformers


@pytest.mark.parametrize("variant", ["base", "tied_no_renorm", "dense_layers"])
def test_int8_computes_with_the_rounded_weights(variant: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "saved", seed=2, dtype=torch.bfloat16, **VARIANTS[variant])
    rounded_int8(tmp_path / "saved", tmp_path / "rounded")
    check_against_transformers(load(tmp_path / "saved", "int8")[0], tmp_path / "rounded")


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An FP8 checkpoint in one file, the same in shards and with stacked experts, and the values of both."""
    root: Path = tmp_path_factory.mktemp("fp8")
    make_checkpoint(root / "saved", seed=4, **LARGE_ENOUGH)
    to_fp8(root / "saved", root / "single")
    to_fp8(root / "saved", root / "shards", num_shards=3)
    to_fused_layout(root / "saved", root / "saved-fused")
    to_fp8(root / "saved-fused", root / "fused", scale_dtype=torch.bfloat16)
    rounded_fp8(root / "single", root / "values")
    rounded_fp8(root / "fused", root / "fused-values")
    rounded_fp8(root / "single", root / "int8-values", then_int8=True)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize(
    ("layout", "quantization", "device", "values"),
    [
        ("single", None, "cpu", "values"),
        ("single", None, "cuda", "values"),
        ("shards", None, "cpu", "values"),
        ("shards", None, "cuda", "values"),
        ("fused", None, "cpu", "fused-values"),
        ("fused", None, "cuda", "fused-values"),
        ("single", "int8", "cpu", "int8-values"),
    ],
)
def test_fp8_computes_with_the_values_of_the_codes(
    fp8: dict[str, Path], layout: str, quantization: str | None, device: str, values: str
) -> None:
    model, report = load(fp8[layout], quantization, device=device)
    experts = [p for name, p in model.named_parameters() if name.endswith("experts.gate_up_proj")]
    wanted = (
        {"cpu": torch.float32, "cuda": torch.float8_e4m3fn}[device] if quantization is None else torch.int8
    )
    assert {p.dtype for p in experts} == {wanted}
    assert report.bytes_read == read_index(resolve_model(fp8[layout])).total_bytes
    check_against_transformers(model, fp8[values])


def test_float8_experts_whose_gate_ends_inside_a_block_are_dequantised(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "saved", seed=4)
    to_fp8(tmp_path / "saved", tmp_path / "fp8")
    rounded_fp8(tmp_path / "fp8", tmp_path / "values")
    model, _ = load(tmp_path / "fp8", device="cuda")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    check_against_transformers(model, tmp_path / "values")


# --------------------------------------------------------------------------- experts across ranks


@pytest.mark.parametrize(("quantization", "device"), [("int8", "cpu"), (None, "cuda")])
@pytest.mark.parametrize("layout", ["single", "fused"])
def test_codes_and_scales_go_with_their_expert(
    fp8: dict[str, Path], layout: str, quantization: str | None, device: str
) -> None:
    whole = dict(load(fp8[layout], quantization, device=device)[0].named_parameters())
    for local in ((3, 0), (1, 2, 4)):
        model, _ = load(fp8[layout], quantization, device=device, local=local)
        for name, parameter in model.named_parameters():
            wanted = whole[name][list(local)] if ".mlp.experts." in name else whole[name]
            assert torch.equal(_bits(parameter), _bits(wanted)), name


@pytest.mark.parametrize(("quantization", "device"), [("int8", "cpu"), (None, "cuda")])
def test_moving_an_experts_row_of_every_parameter_moves_the_expert(
    fp8: dict[str, Path], quantization: str | None, device: str
) -> None:
    """As rebalancing does: expert 4 goes from one rank into the place of expert 1 on another."""
    source, _ = load(fp8["single"], quantization, device=device, local=(0, 4))
    moved, _ = load(fp8["single"], quantization, device=device, local=(1, 2))
    wanted, _ = load(fp8["single"], quantization, device=device, local=(4, 2))
    with torch.no_grad():
        for layer, other in zip(moved.layers, source.layers, strict=True):
            for place, row in zip(
                layer.mlp.experts.parameters(), other.mlp.experts.parameters(), strict=True
            ):
                assert place.shape[0] == 2
                place[0].copy_(row[1])
    for (name, parameter), expected in zip(moved.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(_bits(parameter), _bits(expected)), name


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """float8 has no comparison."""
    return tensor.detach().view(torch.uint8) if tensor.element_size() == 1 else tensor.detach()


# --------------------------------------------------------------------------- what is quantised, and its bytes


def test_int8_parameters_are_the_linear_layers_and_experts(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, dtype=torch.bfloat16, mlp_only_layers=[1])
    model, _ = load(tmp_path, "int8", dtype=torch.bfloat16)
    parameters = dict(model.named_parameters())
    by_last_names = {
        ".".join(name.split(".")[-3 if "expert" in name else -2 :])
        for name, p in parameters.items()
        if p.dtype == torch.int8
    }
    assert by_last_names == {
        "in_proj_qkvz.weight", "in_proj_ba.weight", "in_proj.weight", "out_proj.weight", "lm_head.weight",
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "shared_expert.gate_up_proj.weight",
        "shared_expert.down_proj.weight", "gate_up_proj.weight", "down_proj.weight",
    }  # fmt: skip
    for name, parameter in parameters.items():
        if parameter.dtype == torch.int8:
            scale = parameters[f"{name}_scale"]
            assert scale.dtype == torch.float32
            assert scale.shape == parameter.shape[:-1]
            assert int(parameter.min()) >= -127  # -128 is what it held before
            assert (parameter.abs().amax(-1) == 127).all()


def test_a_rank_holds_half_the_bytes_and_never_a_second_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, dtype=torch.bfloat16, hidden_size=128, moe_intermediate_size=64)
    index = read_index(resolve_model(tmp_path))
    largest = max(entry.end - entry.start for entry in index.values())
    chunk = 1 << 10
    monkeypatch.setattr(quantized, "_CHUNK_ELEMENTS", chunk)
    with LargestTensor() as seen:
        model, _ = load(tmp_path, "int8", dtype=torch.bfloat16)
    own = {p.data_ptr() for p in model.parameters()}
    rest = sum(p.nbytes for p in model.parameters() if p.dtype == torch.bfloat16)
    small = sum(p.nbytes for p in model.parameters() if p.dtype == torch.float32)
    total = sum(p.nbytes for p in model.parameters())
    exponents = sum(p.nbytes for name, p in model.named_parameters() if name.endswith(("A_log", "dt_bias")))
    assert total == (index.total_bytes - exponents // 2 - rest) // 2 + rest + small
    assert total < 0.65 * index.total_bytes
    # Beside the parameters there is a tensor as it lies in the file, or rearranged, and float32 parts of it.
    assert seen.largest_outside(own) <= max(largest, 4 * max(chunk, 128 * 128))


class LargestTensor(TorchDispatchMode):
    """Records the storages that are made, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place = storage.data_ptr()
                self._bytes[place] = max(storage.nbytes(), self._bytes.get(place, 0))
        return result

    def largest_outside(self, known: set[int]) -> int:
        return max(size for place, size in self._bytes.items() if place not in known)


# --------------------------------------------------------------------------- checkpoints that do not fit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tensors, name: tensors.pop(f"{name}_scale_inv"),
            r"1 without usable scales \(NAME is F8_E4M3 and NAME_scale_inv is missing\)",
        ),
        (
            lambda tensors, name: tensors.update({f"{name}_scale_inv": torch.ones(1, 3)}),
            r"1 without usable scales \(NAME_scale_inv is F32 \[1, 3\], wanted \[1, 2\] in one of F32, F16, BF16\)",
        ),
        (
            lambda tensors, name: tensors.update({"model.norm.weight_scale_inv": torch.ones(1)}),
            r"1 left over \(model\.norm\.weight_scale_inv\)",
        ),
        (
            lambda tensors, name: tensors.update({name: tensors[name].view(torch.int8)}),
            r"1 left over \(NAME_scale_inv\); 1 of the wrong dtype \(NAME is I8",
        ),
        (
            lambda tensors, name: tensors.update({name: tensors.pop(f"{name}_scale_inv").new_ones(128, 160)}),
            r"config\.json says that the experts are fp8, and 1 of their tensors are not \(NAME\); .*device='cpu'",
        ),
    ],
    ids=["no scale", "other blocks", "scale of nothing", "int8", "plain expert"],
)
def test_broken_fp8_checkpoints_are_refused(
    fp8: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, torch.Tensor], str], Any], words: str
) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors = load_file(fp8["single"] / "model.safetensors")
    change(tensors, name)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(resolve_model(fp8["single"]).config))
    model = build(tmp_path, device="cuda")
    index = read_index(resolve_model(tmp_path))
    with pytest.raises(CheckpointError, match=words.replace("NAME", name.replace(".", r"\."))):
        plan_load(model, model.weight_map(index.__contains__), index)


def test_cpu_ranks_take_experts_that_are_partly_fp8(fp8: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    values = load_file(fp8["values"] / "model.safetensors")
    tensors = load_file(fp8["single"] / "model.safetensors")
    tensors[name] = values[name]
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(resolve_model(fp8["single"]).config))
    check_against_transformers(load(tmp_path)[0], fp8["values"])
