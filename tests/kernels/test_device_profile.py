"""DeviceProfile and the kernel plan that follows from it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from moe_kernels import device
from moe_kernels.device import DeviceProfile, _cpuinfo
from moe_kernels.native.units import LEVELS
from moe_kernels.select import cpu_levels

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


@pytest.mark.parametrize("allowed", [True, False])
def test_amx_is_there_only_where_the_system_lets_this_process_use_it(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = frozenset({"avx2", "amx_tile", "amx_bf16", "amx_int8"})
    monkeypatch.setattr(device, "_cpuinfo", lambda path: ("Some CPU", flags))
    monkeypatch.setattr(device, "may_use_amx", lambda: allowed)
    wanted = ("avx2", "amx_tile", "amx_bf16", "amx_int8") if allowed else ("avx2",)
    assert DeviceProfile.query().instruction_sets == wanted


@pytest.mark.parametrize("level", LEVELS)
def test_a_cpu_is_asked_for_all_that_the_native_kernels_need(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_cpuinfo", lambda path: ("Some CPU", frozenset(LEVELS[level])))
    monkeypatch.setattr(device, "may_use_amx", lambda: True)
    assert cpu_levels(DeviceProfile.query())[0] == level
