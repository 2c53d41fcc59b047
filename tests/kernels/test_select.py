"""select: which kernels a device of each kind gets, and why."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from moe_kernels.device import DeviceProfile
from moe_kernels.native.units import LEVELS
from moe_kernels.select import KernelPlan, cpu_levels, select
from moe_kernels.shapes import KernelShapes

SHAPES = KernelShapes(
    hidden_size=2048,
    num_experts=512,
    num_local_experts=64,
    top_k=10,
    moe_intermediate_size=512,
    max_tokens=2048,
    head_size=256,
    num_heads=16,
    num_kv_heads=2,
    key_size=128,
    value_size=128,
    num_key_heads=16,
    num_value_heads=32,
    conv_width=4,
)


def cpu(*sets: str) -> DeviceProfile:
    return DeviceProfile(kind="cpu", name="a CPU", total_memory=1 << 34, num_cores=8, instruction_sets=sets)


HASWELL_SETS = ("avx2", "fma", "f16c")
SKYLAKE_SETS = (*HASWELL_SETS, "avx512f", "avx512bw", "avx512vl", "avx512dq")
ZEN4_SETS = (*SKYLAKE_SETS, "avx512_vnni", "avx512_bf16")
BARE = cpu()
AVX2 = cpu(*HASWELL_SETS)
AVX512 = cpu(*SKYLAKE_SETS)
ZEN4 = cpu(*ZEN4_SETS)
SAPPHIRE_RAPIDS = cpu(*ZEN4_SETS, "amx_tile", "amx_bf16", "amx_int8")
# AVX-512 without the parts that later CPUs have with it: illegal instructions, were it taken for theirs.
KNIGHTS_LANDING = cpu(*HASWELL_SETS, "avx512f")


def implementations(plan: KernelPlan) -> dict[str, str]:
    return {field.name: getattr(plan, field.name).implementation for field in fields(plan)}


@pytest.mark.parametrize(
    ("profile", "wanted"),
    [
        (AVX2, "cpu:avx2"),
        (KNIGHTS_LANDING, "cpu:avx2"),
        (AVX512, "cpu:avx512"),
        (ZEN4, "cpu:avx512_bf16"),
        (SAPPHIRE_RAPIDS, "cpu:amx"),
    ],
)
def test_a_cpu_gets_the_kernels_compiled_for_its_best_instructions(
    profile: DeviceProfile, wanted: str
) -> None:
    plan = select(profile, SHAPES, torch.bfloat16, libraries={"native"})
    assert set(implementations(plan).values()) == {wanted}


@pytest.mark.parametrize("level", LEVELS)
def test_a_cpu_that_lacks_one_feature_of_a_level_does_not_get_it(level: str) -> None:
    assert cpu_levels(cpu(*LEVELS[level]))[0] == level
    for missing in LEVELS[level]:
        assert level not in cpu_levels(cpu(*(name for name in LEVELS[level] if name != missing)))


@pytest.mark.parametrize(
    ("changes", "dtype", "reason"),
    [
        ({}, torch.float16, "do not compute in torch.float16"),
        (
            {"head_size": 512},
            torch.bfloat16,
            "head size of attention is 512, layers in one call have at most 256",
        ),
        ({"key_size": 384}, torch.bfloat16, "key size of Gated DeltaNet is 384"),
        ({"conv_width": 17}, torch.bfloat16, "convolution width of Gated DeltaNet is 17"),
        ({"num_heads": 128}, torch.bfloat16, "query heads of a key head is 64"),
        ({"num_experts": 8192}, torch.bfloat16, "number of experts is 8192"),
    ],
)
def test_what_layers_in_one_call_cannot_is_computed_operation_by_operation(
    changes: dict[str, int], dtype: torch.dtype, reason: str
) -> None:
    plan = select(ZEN4, replace(SHAPES, **changes), dtype, libraries={"native"})
    assert plan.blocks.implementation == "reference"
    assert reason in plan.blocks.reason
    assert {**implementations(plan), "blocks": "cpu:avx512_bf16"} == dict.fromkeys(
        implementations(plan), "cpu:avx512_bf16"
    )


def test_weights_in_float8_are_for_single_operations() -> None:
    plan = select(ZEN4, SHAPES, torch.bfloat16, libraries={"native"})
    assert plan.with_weights(linear=torch.int8, experts=torch.int8).blocks.isa == "avx512_bf16"
    float8 = plan.with_weights(linear=torch.float8_e4m3fn, experts=torch.float8_e4m3fn)
    assert float8.blocks.isa is None
    assert "weights are kept in torch.float8_e4m3fn" in float8.blocks.reason


@pytest.mark.parametrize(("profile", "libraries"), [(BARE, {"native"}), (ZEN4, set())])
def test_without_compiled_kernels_products_are_computed_in_float32(
    profile: DeviceProfile, libraries: set[str]
) -> None:
    plan = select(profile, SHAPES, torch.bfloat16, libraries=libraries)
    assert plan.grouped_gemm.implementation == plan.linear.implementation == "float32"
    assert plan.norm.implementation == "reference"
    assert set(implementations(select(profile, SHAPES, torch.float32, libraries=libraries)).values()) == {
        "reference"
    }


def test_a_forced_reference_says_so() -> None:
    plan = select(ZEN4, SHAPES, torch.bfloat16, family="reference", libraries={"native"})
    lines = plan.describe().splitlines()
    assert [line.split()[0] for line in lines] == [field.name for field in fields(KernelPlan)]
    assert all("plain torch on cpu, forced by the kernel family 'reference'" in line for line in lines)


@pytest.mark.parametrize(
    ("family", "dtype", "message"),
    [
        ("fast", torch.float32, "kernel family is 'fast'; wanted one of"),
        ("auto", torch.int8, "dtype is torch.int8; the kernels compute in torch.float32"),
        ("triton", torch.float64, "kernel family is 'triton', which has no float64"),
    ],
)
def test_what_there_are_no_kernels_for_is_refused(family: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(ZEN4, SHAPES, dtype, family=family)


def gpu(name: str, capability: tuple[int, int] | None, processors: int, shared: int) -> DeviceProfile:
    return DeviceProfile(
        kind="cuda",
        name=name,
        total_memory=1 << 36,
        compute_capability=capability,
        gcn_architecture=None if capability else "gfx942",
        num_multiprocessors=processors,
        shared_memory_per_block_optin=shared,
    )


A100 = gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912)
L40S = gpu("NVIDIA L40S", (8, 9), 142, 101376)
H100 = gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448)
H200 = gpu("NVIDIA H200", (9, 0), 132, 232448)
B200 = gpu("NVIDIA B200", (10, 0), 148, 232448)
RTX_5090 = gpu("NVIDIA GeForce RTX 5090", (12, 0), 170, 101376)
MI300X = gpu("AMD Instinct MI300X", None, 304, 65536)


@pytest.mark.parametrize(
    ("profile", "architecture", "decode", "prefill", "native_fp8"),
    [
        (A100, "sm_80, from its table", "decode 16x64x64", "prefill 64x128x64", False),
        (L40S, "sm_89, from its table", "decode 16x64x64", "prefill 64x128x64", True),
        (H100, "sm_90, from its table", "decode 16x64x64 swapped", "prefill 128x128x64 tma", True),
        (H200, "sm_90, from its table", "decode 16x64x64 swapped", "prefill 128x128x64 tma", True),
        (B200, "sm_100, from its table", "decode 16x64x64 swapped", "prefill 128x128x64 tma", True),
        (RTX_5090, "sm_120, from its table", "decode 16x64x64", "prefill 64x128x64 tma", True),
        (MI300X, "gfx942, by rule", "decode 16x64x64", "prefill 64x128x32", False),
    ],
    ids=lambda value: value.name if isinstance(value, DeviceProfile) else "",
)
def test_a_gpu_gets_triton_kernels_in_tiles_of_its_architecture(
    profile: DeviceProfile, architecture: str, decode: str, prefill: str, native_fp8: bool
) -> None:
    plan = select(profile, replace(SHAPES, max_tokens=65536), torch.bfloat16)
    experts = plan.grouped_gemm
    assert architecture in experts.reason
    assert experts.launch.native_fp8 == native_fp8
    # A row in all is 10/512 of a row an expert.
    assert [str(experts.launch.bucket(rows)) for rows in (400, 60_000)] == [decode, prefill]
    assert experts.launch.num_multiprocessors == profile.num_multiprocessors
    assert implementations(plan) == {
        **dict.fromkeys(implementations(plan), "triton"),
        "linear": "reference",
        "blocks": "reference",
    }
    assert "the vendor's dense product" in plan.linear.reason


def test_float8_experts_get_tiles_of_their_own() -> None:
    plan = select(H100, replace(SHAPES, expert_dtype=torch.float8_e4m3fn), torch.bfloat16)
    assert str(plan.grouped_gemm.launch.bucket(400)) == "decode 16x64x128 swapped"


def test_nothing_but_torch_computes_in_float64() -> None:
    for profile in (H100, ZEN4):
        plan = select(profile, SHAPES, torch.float64, libraries={"native", "fla", "flashinfer"})
        assert set(implementations(plan).values()) == {"reference"}


@pytest.mark.parametrize(
    ("operation", "profile", "dtype", "libraries", "wanted", "reason"),
    [
        ("gated_delta", H100, torch.bfloat16, {"fla"}, "fla", "for prefills, Triton kernel for decodes"),
        ("gated_delta", H100, torch.bfloat16, set(), "triton", "is not installed"),
        ("gated_delta", MI300X, torch.float16, {"fla"}, "triton", "needs a GPU of sm_80 or later"),
        ("gated_delta", H100, torch.float32, {"fla"}, "triton", "does not compute in torch.float32"),
        ("attention", H100, torch.bfloat16, {"flashinfer"}, "flashinfer", "FlashInfer"),
        ("attention", H100, torch.bfloat16, {"fla"}, "triton", "FlashInfer is not installed"),
        ("attention", MI300X, torch.float16, {"flashinfer"}, "triton", "needs a GPU of sm_80 or later"),
        ("attention", H100, torch.float32, {"flashinfer"}, "triton", "does not compute in torch.float32"),
    ],
)
def test_a_library_is_taken_where_it_can_be(
    operation: str, profile: DeviceProfile, dtype: torch.dtype, libraries: set[str], wanted: str, reason: str
) -> None:
    choice = getattr(select(profile, SHAPES, dtype, libraries=libraries), operation)
    assert choice.implementation == wanted
    assert reason in choice.reason


def test_heads_that_flashinfer_has_not_are_left_to_triton() -> None:
    shapes = replace(SHAPES, head_size=72)
    choice = select(H100, shapes, torch.bfloat16, libraries={"flashinfer"}).attention
    assert (choice.implementation, "no heads of 72" in choice.reason) == ("triton", True)
