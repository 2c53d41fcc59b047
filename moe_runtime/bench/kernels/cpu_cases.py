"""What `bench kernels` times on a CPU: bfloat16 values, and weights in bfloat16 or int8, as a rank has them.

Shape legend: T tokens, E experts (all local), K top-k, H hidden, F expert intermediate, N output features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moe_kernels.aot.qwen3_next import qwen3_next_80b
from moe_kernels.aot.roofline import Work
from moe_kernels.device import DeviceProfile
from moe_kernels.grouped_gemm import fused_experts
from moe_kernels.linear import linear
from moe_kernels.quant import scale_shape
from moe_kernels.select import KernelPlan
from moe_runtime.bench.kernels.cases import CACHE_MULTIPLE, Case, Setting, make_case
from moe_runtime.bench.kernels.cpu_limits import cache_bytes
from moe_runtime.bench.kernels.mixer_cases import mixer_cases
from moe_runtime.bench.kernels.token_cases import token_cases

_EXPERT_SIZES = ((128, 2048, 512), (512, 1024, 256))  # E, H, F
_TOP_K = 10
_DECODE_TOKENS = (1, 2, 4, 8)
_INT8_DECODE_TOKENS = (1, 8)
_LINEAR = (12288, 2048)  # Qwen3-Next's largest projection
_NUM_CALLS = 32  # of a decode's experts: different choices in turns, at least
_MOST_LAYERS_BYTES = 4 << 30  # of the experts' weights of one size
# Random choices soon hit again what others did: that much of the layers is all that calls are asked to touch.
_TOUCHED_PART = 0.8
# A code is up to 127: with this scale a row's weights are as large as bfloat16 ones.
_INT8_SCALE = 1 / 73


@dataclass(frozen=True, slots=True, kw_only=True)
class _TorchProducts:
    """How torch is best asked for products on this CPU."""

    implementation: str  # of `linear` and `fused_experts`
    suffix: str  # says so in the table

    @classmethod
    def on(cls, profile: DeviceProfile) -> _TorchProducts:
        """Without instructions for them, torch takes many times as long for bfloat16 products as for float32 ones."""
        if {"avx512_bf16", "amx_bf16"} & set(profile.instruction_sets):
            return cls(implementation="reference", suffix="")
        return cls(implementation="float32", suffix=" in float32")


def cpu_setting(isa: str) -> Setting:
    """With Qwen3-Next-80B's sizes, and few sequences: each CPU rank has its own."""
    return Setting(
        device=torch.device("cpu"),
        plan=KernelPlan.uniform(f"cpu:{isa}", "measured here"),
        shapes=qwen3_next_80b(1),
        cache_bytes=cache_bytes(),
        decode_sequences=8,
        context=2048,
        prefill_tokens=512,
    )


def all_cases(setting: Setting, profile: DeviceProfile) -> list[Case]:
    """All of them, their weights filled: some gigabytes."""
    products = _TorchProducts.on(profile)
    cases = []
    for dtype in (torch.bfloat16, torch.int8):
        for num_experts, hidden, inner in _EXPERT_SIZES:
            cases += _experts(setting, products, num_experts, hidden, inner, dtype)
    for dtype in (torch.bfloat16, torch.int8):
        cases += _linears(setting, products, dtype)
    return [*cases, *mixer_cases(setting), *token_cases(setting)]


def _weight(setting: Setting, dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight whose products are about as large as what they multiply, and its scales where it is int8."""
    scale = shape[-1] ** -0.5
    if dtype != torch.int8:
        return setting.filled(*shape, scale=scale), None
    return setting.filled(*shape, dtype=dtype), torch.full(scale_shape(shape, dtype), scale * _INT8_SCALE)


def _label(dtype: torch.dtype) -> str:
    return " int8" if dtype == torch.int8 else ""


def num_layers(layer_bytes: int, cache_bytes: int) -> int:
    """Layers of experts for calls to touch four caches of weights, as far as they fit in 4 GiB."""
    wanted = math.ceil(CACHE_MULTIPLE * cache_bytes / _TOUCHED_PART / layer_bytes)
    return max(1, min(wanted, _MOST_LAYERS_BYTES // layer_bytes))


def choices_past_cache(
    tokens: int, num_experts: int, layers: int, wanted: float, at_least: int
) -> tuple[list[torch.Tensor], int]:
    """Experts [T, K] of calls to `layers` in turns, until so many different ones are touched; and how many are.

    Only experts that are chosen are read: few tokens need more calls than weights need layers.
    """
    wanted = min(wanted, _TOUCHED_PART * layers * num_experts)
    choices: list[torch.Tensor] = []
    touched = torch.zeros(layers, num_experts, dtype=torch.bool)
    while len(choices) < at_least or touched.sum() < wanted:
        generator = torch.Generator().manual_seed(len(choices))
        ids = torch.rand(tokens, num_experts, generator=generator).topk(_TOP_K).indices
        touched[len(choices) % layers, ids.flatten()] = True
        choices.append(ids)
    return choices, int(touched.sum())


def _experts(
    setting: Setting, products: _TorchProducts, num_experts: int, hidden: int, inner: int, dtype: torch.dtype
) -> list[Case]:
    # A row's scale is a float32.
    per_expert = 3 * inner * hidden * dtype.itemsize + (
        4 * (2 * inner + hidden) if dtype == torch.int8 else 0
    )
    layers = []
    for _ in range(num_layers(num_experts * per_expert, setting.cache_bytes)):
        gate_up, gate_up_scale = _weight(setting, dtype, num_experts, 2 * inner, hidden)
        down, down_scale = _weight(setting, dtype, num_experts, hidden, inner)
        layers.append((gate_up, down, gate_up_scale, down_scale))
    decodes = _INT8_DECODE_TOKENS if dtype == torch.int8 else _DECODE_TOKENS
    cases = []
    for tokens in (*decodes, setting.prefill_tokens):
        part = "prefill" if tokens == setting.prefill_tokens else "decode"
        inputs, active = [], 0.0
        wanted = CACHE_MULTIPLE * setting.cache_bytes / per_expert
        at_least = _NUM_CALLS if part == "decode" else 1
        choices, touched = choices_past_cache(tokens, num_experts, len(layers), wanted, at_least)
        few = f", only {touched * per_expert / setting.cache_bytes:.1f} caches" if touched < wanted else ""
        for number, ids in enumerate(choices):
            active += ids.unique().numel()
            weights = torch.full((tokens, _TOP_K), 0.1, dtype=torch.bfloat16)
            inputs.append((setting.filled(tokens, hidden), ids, weights, *layers[number % len(layers)]))
        cases.append(
            make_case(
                f"experts{_label(dtype)} {part} E={num_experts} H={hidden} F={inner} T={tokens}{few}",
                fused_experts,
                setting.plan.grouped_gemm,
                inputs,
                Work(6.0 * tokens * _TOP_K * inner * hidden, active / len(inputs) * per_expert),
                torch_implementation=products.implementation,
                torch_way="reference" + products.suffix,
            )
        )
    return cases


def _linears(setting: Setting, products: _TorchProducts, dtype: torch.dtype) -> list[Case]:
    rows, columns = _LINEAR
    num_bytes = rows * columns * dtype.itemsize
    weight, scale = _weight(setting, dtype, setting.turns(num_bytes), rows, columns)
    scales = [None] * len(weight) if scale is None else list(scale)

    def case(tokens: int) -> Case:
        x = setting.filled(tokens, columns)
        return make_case(
            f"linear{_label(dtype)} N={rows} K={columns} T={tokens}",
            linear,
            setting.plan.linear,
            [(x, *some) for some in zip(weight, scales, strict=True)],
            Work(2.0 * tokens * rows * columns, num_bytes + (4 * rows if dtype == torch.int8 else 0)),
            torch_implementation=products.implementation,
            torch_way=("F.linear" if dtype != torch.int8 else "reference") + products.suffix,
        )

    return [case(1), case(setting.prefill_tokens)]
