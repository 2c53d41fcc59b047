"""DeviceProfile and the kernel plan that follows from it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from moe_kernels.device import DeviceProfile, _cpuinfo
from moe_kernels.select import KernelPlan, select

A100 = DeviceProfile(
    kind="cuda",
    name="NVIDIA A100",
    total_memory=80 << 30,
    compute_capability=(8, 0),
    num_multiprocessors=108,
    shared_memory_per_block_optin=166912,
    l2_bytes=40 << 20,
)


def test_the_cpu_says_what_it_is() -> None:
    profile = DeviceProfile.query("cpu")
    assert profile.kind == "cpu"
    assert profile.name
    assert profile.num_cores >= 1
    assert profile.total_memory > 1 << 26
    assert profile.compute_capability is None
    assert str(profile.num_cores) in str(profile)


def test_a_profile_is_json_able() -> None:
    seen = json.loads(json.dumps(A100.to_dict()))
    assert seen["compute_capability"] == [8, 0]
    assert set(seen) == {field.name for field in fields(DeviceProfile)}


def test_cpuinfo_of_both_families(tmp_path: Path) -> None:
    x86 = tmp_path / "x86"
    x86.write_text("processor : 0\nmodel name : Some CPU: fast\nflags : fpu avx2 avx512f amx_bf16\n")
    assert _cpuinfo(x86) == ("Some CPU: fast", {"fpu", "avx2", "avx512f", "amx_bf16"})
    arm = tmp_path / "arm"
    arm.write_text("processor : 0\nFeatures : fp asimd sve\n")
    assert _cpuinfo(arm) == ("", {"fp", "asimd", "sve"})
    assert _cpuinfo(tmp_path / "absent") == ("", frozenset())


def test_an_unknown_kind_of_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device is 'tpu'; wanted 'cpu', 'cuda' or 'cuda:N'"):
        DeviceProfile.query("tpu")


@pytest.mark.gpu
def test_a_gpu_says_what_it_is() -> None:
    profile = DeviceProfile.query("cuda")
    assert profile.compute_capability >= (7, 0)
    assert profile.shared_memory_per_block_optin > 48 << 10
    assert profile.l2_bytes > 1 << 20


@pytest.mark.parametrize("family", ["auto", "reference"])
def test_every_operation_gets_the_reference_with_an_honest_reason(family: str) -> None:
    plan = select(A100, torch.bfloat16, family)
    operations = [field.name for field in fields(KernelPlan)]
    assert {getattr(plan, name).implementation for name in operations} == {"reference"}
    lines = plan.describe().splitlines()
    assert [line.split()[0] for line in lines] == operations
    assert all("plain torch on cuda" in line for line in lines)


@pytest.mark.parametrize(
    ("family", "dtype", "message"),
    [
        ("triton", torch.float32, "'triton', which this version does not have yet; use one of"),
        ("cpu", torch.float32, "'cpu', which this version does not have yet"),
        ("fast", torch.float32, "kernel family is 'fast'; wanted one of"),
        ("auto", torch.int8, "dtype is torch.int8; the kernels compute in torch.float32"),
    ],
)
def test_what_there_are_no_kernels_for_is_refused(family: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(A100, dtype, family)
