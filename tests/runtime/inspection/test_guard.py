"""The guard detects a touch by the call itself: on a machine with a GPU, without one, swallowed or not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"

# Makes torch look as it does where there are GPUs: every call below succeeds before the guard is laid.
FAKE_GPU = """
import types, torch
torch.cuda._lazy_init = lambda: None
torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(major=9)
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 8
torch._C._cuda_getDevice = lambda: 0
torch._C._cuda_setDevice = lambda device: None
assert torch.cuda.get_device_properties(0).major == 9
torch.cuda.set_device(3)
"""
RUN_PROBES = """
import ctypes, json, os, subprocess, sys
from moe_runtime.inspection.guard import AcceleratorGuard
guard = AcceleratorGuard()
guard.install()
import torch
results = {}
for probe in json.load(sys.stdin):
    before = len(guard.touches)
    try:
        value = repr(eval(probe))
    except Exception as error:
        value = type(error).__name__
    results[probe] = [[touch.call for touch in guard.touches[before:]], value]
print(json.dumps(results))
"""
TOUCHES = {
    "torch.cuda.get_device_properties(0)": "torch.cuda.get_device_properties",
    "torch.cuda.get_device_name(0)": "torch.cuda.get_device_name",
    "torch.cuda.get_device_capability()": "torch.cuda.get_device_capability",
    "torch.cuda.current_device()": "torch.cuda.current_device",
    "torch.cuda.set_device(0)": "torch.cuda.set_device",
    "torch.cuda.synchronize()": "torch.cuda.synchronize",
    "torch.cuda.mem_get_info()": "torch.cuda.mem_get_info",
    "torch.cuda.memory_allocated()": "torch.cuda.memory_allocated",
    "torch.cuda.init()": "torch.cuda.init",
    "torch.cuda.Stream()": "torch.cuda.Stream",
    "torch.cuda.device(0).__enter__()": "torch.cuda.device.__enter__",
    "torch.cuda.random.get_rng_state()": "torch.cuda.get_rng_state",
    "torch.zeros(1, device='cuda')": "torch.cuda._lazy_init",
    "torch.zeros(1).cuda()": "torch.cuda._lazy_init",
    "torch.nn.Linear(1, 1).cuda()": "torch.nn.modules.module.Module.cuda",
    "torch._C._cuda_getDevice()": "torch._C._cuda_getDevice",
    "torch._C._accelerator_getDeviceIndex()": "torch._C._accelerator_getDeviceIndex",
    "torch.accelerator.current_device_index()": "torch.accelerator.current_device_index",
    "torch.accelerator.synchronize()": "torch.accelerator.synchronize",
    "torch.xpu.get_device_properties(0)": "torch.xpu.get_device_properties",
    "torch.mps.synchronize()": "torch.mps.synchronize",
    "torch.mtia.current_device()": "torch.mtia.current_device",
    "__import__('triton').runtime.driver.active": "triton.runtime.driver.DriverConfig.active",
    "ctypes.CDLL('libcuda.so.1')": "ctypes.CDLL('libcuda.so.1')",
    "ctypes.CDLL('/usr/lib/libnvidia-ml.so.1')": "ctypes.CDLL('libnvidia-ml.so.1')",
    "open('/dev/nvidia0')": "open('/dev/nvidia0')",
    "subprocess.run(['/usr/bin/nvidia-smi', '-L'])": "nvidia-smi",
    "os.system('nvidia-smi -L')": "nvidia-smi",
}
ALLOWED = {
    "torch.cuda.is_available()": "False",
    "torch.cuda.device_count()": "0",
    "torch.cuda.is_initialized()": "False",
    "torch.cuda.is_bf16_supported()": "False",
    "torch.xpu.is_available()": "False",
    "torch.backends.mps.is_available()": "False",
    "torch.accelerator.is_available()": "False",
    "torch.accelerator.device_count()": "0",
    "torch.accelerator.current_accelerator()": "None",
    "torch.cuda.manual_seed(0)": "None",
    "torch.manual_seed(3).initial_seed()": "3",
    "torch.ones(3, device='meta').sum().device.type": "'meta'",
    "__import__('triton').cdiv(5, 2)": "3",
    "ctypes.CDLL(None).getpid() == os.getpid()": "True",
}


def _run(script: str, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], input=stdin, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["plain", "fake GPU"])
def probed(request: pytest.FixtureRequest) -> dict[str, tuple[list[str], str]]:
    """Calls recorded and value or error of every probe, in a process as it is and in one that seems to have GPUs."""
    script = FAKE_GPU + RUN_PROBES if request.param == "fake GPU" else RUN_PROBES
    results = json.loads(_run(script, json.dumps([*TOUCHES, *ALLOWED])))
    if request.param == "plain":
        del results["torch._C._cuda_getDevice()"]  # only a CUDA build of torch has it
    return results


def test_every_touch_is_recorded_by_the_name_of_the_call(probed: dict[str, tuple[list[str], str]]) -> None:
    seen = {probe: result for probe, result in probed.items() if probe in TOUCHES}
    assert seen == {probe: [[TOUCHES[probe]], "ForbiddenTouchError"] for probe in seen}
    assert len(seen) >= len(TOUCHES) - 1


def test_asking_whether_there_is_a_device_is_allowed_and_answered_no(
    probed: dict[str, tuple[list[str], str]],
) -> None:
    assert {probe: probed[probe] for probe in ALLOWED} == {p: [[], value] for p, value in ALLOWED.items()}


def test_chain_is_found_where_the_query_would_have_succeeded() -> None:
    script = f"""{FAKE_GPU}
import json, sys
from moe_runtime.inspection.guard import AcceleratorGuard, ForbiddenTouchError
guard = AcceleratorGuard()
guard.install()
sys.path.insert(0, {str(FIXTURES)!r})
try:
    import qwen3_next_vl
except ForbiddenTouchError:
    (touch,) = guard.touches
    print(json.dumps([touch.call, [[link.module, link.line, link.source] for link in touch.chain]]))
"""
    call, chain = json.loads(_run(script))
    assert call == "torch.cuda.get_device_properties"
    assert chain[-4:] == [
        ["qwen3_next_vl", 3, "from qwen3_next import TouchyForCausalLM as TouchyForCausalLM"],
        ["qwen3_next", 3, "import mamba_mixer"],
        ["mamba_mixer", 3, "import expert_parallel"],
        ["expert_parallel", 6, "SM = torch.cuda.get_device_properties(dev).major"],
    ]


def test_copies_that_torch_modules_took_earlier_are_trapped() -> None:
    script = """
import torch.cuda.random
from moe_runtime.inspection.guard import AcceleratorGuard
AcceleratorGuard().install()
print(torch.cuda.random._lazy_init is torch.cuda._lazy_init, torch.cuda._lazy_init.__qualname__)
"""
    assert _run(script).split() == ["True", "AcceleratorGuard._trap.<locals>.trap"]
