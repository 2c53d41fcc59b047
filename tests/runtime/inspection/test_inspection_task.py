"""The inspection task without Ray: what it answers for good models, bad ones, and ones that take the process down."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.inspection.task import run_inspection
from moe_runtime.registry import ModelTarget

FIXTURES = Path(__file__).parent / "fixtures"
TINY_CONFIG = json.loads((FIXTURES / "tiny_config.json").read_text())


@pytest.fixture(autouse=True)
def search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inspecting process looks where this one does: in the fixtures and in the test's own folder."""
    monkeypatch.syspath_prepend(str(FIXTURES))
    monkeypatch.syspath_prepend(str(tmp_path))


def _inspect(
    import_path: str, config: dict[str, Any] | None = None, timeout_s: float = 60.0, dtype: str = "bfloat16"
) -> dict[str, Any]:
    target = ModelTarget(architecture="TinyForCausalLM", import_path=import_path)
    request = {
        "target": target.to_dict(),
        "config": config or TINY_CONFIG,
        "dtype": dtype,
        "quantization": None,
        "kept_quantization": None,
    }
    return run_inspection(request, timeout_s)


def _inspect_source(tmp_path: Path, source: str, timeout_s: float = 60.0) -> dict[str, Any]:
    """Inspect `model:TinyForCausalLM`, whose module is the given source."""
    (tmp_path / "model.py").write_text(source)
    return _inspect("model:TinyForCausalLM", timeout_s=timeout_s)


def test_tiny_model_is_counted() -> None:
    info = _inspect("tiny_moe:TinyForCausalLM")["info"]
    # 5 experts x (2 x 4 x 8 + 8 x 4); q_proj 8 x 8; the embedding 32 x 8, tied and so counted once.
    assert info["parameters"] == {"expert": 480, "attention": 64, "linear_attention": 0, "other": 256}
    assert info["parameter_bytes"] == {"expert": 960, "attention": 128, "linear_attention": 0, "other": 512}
    assert info["kv_bytes_per_token"] == 2 * 2 * 4 * 2
    assert info["state_bytes_per_request"] == 6 * 3 * 2 + 2 * 4 * 4 * 4
    assert info["warnings"] == []
    assert 0 < info["inspection"]["peak_rss_bytes"] < 10**9


def test_bytes_follow_the_dtype() -> None:
    info = _inspect("tiny_moe:TinyForCausalLM", dtype="float32")["info"]
    assert info["parameter_bytes"]["expert"] == 480 * 4
    assert info["kv_bytes_per_token"] == 2 * 2 * 4 * 4


def test_touch_at_import_names_the_chain_in_order() -> None:
    reply = _inspect("qwen3_next_vl:TouchyForCausalLM")
    assert (reply["ok"], reply["error"]) == (False, "AcceleratorTouchError")
    message = reply["message"]
    assert message.startswith(
        "qwen3_next_vl:TouchyForCausalLM: torch.cuda.get_device_properties was called while importing the model at "
        f"{FIXTURES}/expert_parallel.py:6."
    )
    chain = [
        f"qwen3_next_vl ({FIXTURES}/qwen3_next_vl.py:3): from qwen3_next import TouchyForCausalLM",
        f"qwen3_next ({FIXTURES}/qwen3_next.py:3): import mamba_mixer",
        f"mamba_mixer ({FIXTURES}/mamba_mixer.py:3): import expert_parallel",
        f"expert_parallel ({FIXTURES}/expert_parallel.py:6): SM = torch.cuda.get_device_properties(dev).major",
    ]
    lines = [line.strip() for line in message.splitlines()]
    assert [line.startswith(link) for line, link in zip(lines[1:5], chain, strict=True)] == [True] * 4
    assert "worker's __init__" in message
    assert "DeviceProfile" in message


def test_touch_that_the_module_turns_into_its_own_error_is_still_a_touch(tmp_path: Path) -> None:
    source = """
import torch
try:
    NAME = torch.cuda.get_device_name(0)
except RuntimeError as error:
    raise ImportError("this model needs CUDA") from error
"""
    reply = _inspect_source(tmp_path, source)
    assert reply["error"] == "AcceleratorTouchError"
    assert "torch.cuda.get_device_name" in reply["message"]


def test_swallowed_touch_becomes_a_warning(tmp_path: Path) -> None:
    source = """
import torch
try:
    NAME = torch.cuda.get_device_name(0)
except Exception:
    NAME = "unknown"
HAS_GPU = torch.cuda.is_available() or torch.cuda.device_count() > 0
from tiny_moe import TinyForCausalLM
"""
    reply = _inspect_source(tmp_path, source)
    (warning,) = reply["info"]["warnings"]
    assert "torch.cuda.get_device_name was called while importing the model" in warning
    assert f"model ({tmp_path}/model.py:4): NAME = torch.cuda.get_device_name(0)" in warning


def test_touch_while_building_is_named_as_such(tmp_path: Path) -> None:
    source = """
import torch, tiny_moe

class TinyForCausalLM(tiny_moe.TinyForCausalLM):
    def __init__(self, config, shard, plan):
        super().__init__(config, shard, plan)
        self.scale = torch.zeros(1, device="cuda")
"""
    reply = _inspect_source(tmp_path, source)
    assert reply["error"] == "AcceleratorTouchError"
    assert "while building the model" in reply["message"]
    assert f"model, in TinyForCausalLM.__init__ ({tmp_path}/model.py:7): self.scale =" in reply["message"]


def test_import_error_keeps_its_traceback_node_and_interpreter(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("import a_module_that_nobody_has\n")
    reply = _inspect_source(tmp_path, "import helper\n")
    assert reply["error"] == "ModelImportError"
    assert "ModuleNotFoundError: No module named 'a_module_that_nobody_has'" in reply["message"]
    assert f"(node {os.uname().nodename}, interpreter " in reply["message"]
    files = [
        line.split('"')[1] for line in reply["traceback"].splitlines() if line.strip().startswith("File")
    ]
    assert files == [str(tmp_path / "model.py"), str(tmp_path / "helper.py")]


def test_failure_after_a_swallowed_touch_tells_of_it(tmp_path: Path) -> None:
    source = """
import torch
try:
    MAJOR = torch.cuda.get_device_capability()[0]
except RuntimeError:
    MAJOR = None
FAST = MAJOR >= 9
"""
    reply = _inspect_source(tmp_path, source)
    assert reply["error"] == "ModelImportError"
    assert "TypeError: '>=' not supported" in reply["message"]
    assert "before that, torch.cuda.get_device_capability was called" in reply["traceback"]


def test_missing_class_is_named_with_its_nearest() -> None:
    reply = _inspect("tiny_moe:TinyForCausalLm")
    assert reply["error"] == "ConfigError"
    assert "has no 'TinyForCausalLm'; did you mean 'TinyForCausalLM'?" in reply["message"]


def test_configuration_that_the_class_refuses_is_a_config_error() -> None:
    reply = _inspect("tiny_moe:TinyForCausalLM", {**TINY_CONFIG, "hidden_size": 0})
    assert reply["error"] == "ConfigError"
    assert "hidden_size must be at least 1, got 0" in reply["message"]


def test_error_while_building_keeps_its_traceback(tmp_path: Path) -> None:
    source = """
import tiny_moe

class TinyForCausalLM(tiny_moe.TinyForCausalLM):
    def __init__(self, config, shard, plan):
        super().__init__(config, shard, plan)
        self.table = {}["missing"]
"""
    reply = _inspect_source(tmp_path, source)
    assert reply["error"] == "InspectionError"
    assert "building model:TinyForCausalLM on the meta device failed: KeyError: 'missing'" in reply["message"]
    assert 'self.table = {}["missing"]' in reply["traceback"]


@pytest.mark.parametrize(
    ("source", "expected", "shown"),
    [
        ("import ctypes\nctypes.string_at(0)\n", "died of SIGSEGV (segmentation fault)", 'model.py", line 2'),
        ("import os\nos.abort()\n", "died of SIGABRT (aborted)", 'model.py", line 2'),
        (
            "import os\nprint('last words', flush=True)\nos._exit(0)\n",
            "left with exit status 0",
            "last words",
        ),
        ("import sys\nsys.exit(3)\n", "while importing: sys.exit(3)", 'model.py", line 2'),
    ],
    ids=["segfault", "abort", "os._exit", "sys.exit"],
)
def test_crash_names_its_cause(tmp_path: Path, source: str, expected: str, shown: str) -> None:
    reply = _inspect_source(tmp_path, source)
    assert reply["error"] == "InspectionCrashError"
    assert expected in reply["message"]
    assert shown in reply["traceback"]


def test_hanging_import_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    source = """
import os, pathlib, subprocess, time
other = subprocess.Popen(["sleep", "600"])
pathlib.Path(__file__).with_name("pids").write_text(f"{os.getpid()} {other.pid}")
time.sleep(600)
"""
    started = time.monotonic()
    reply = _inspect_source(tmp_path, source, timeout_s=8.0)
    assert time.monotonic() - started < 30
    assert reply["error"] == "InspectionTimeoutError"
    assert "did not end within 8 s and was killed" in reply["message"]
    assert 'model.py", line 5 in <module>' in reply["traceback"]
    inspecting, started_by_it = map(int, (tmp_path / "pids").read_text().split())
    assert not _runs(inspecting)
    # Killed, but not ours to wait for: the kernel takes a moment.
    deadline = time.monotonic() + 10
    while _runs(started_by_it) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(started_by_it)


def test_thread_that_never_ends_does_not_hold_the_answer_back(tmp_path: Path) -> None:
    source = """
import threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
print("noise on standard output")
from tiny_moe import TinyForCausalLM
"""
    assert _inspect_source(tmp_path, source, timeout_s=30.0)["ok"]


def test_parameter_with_a_device_of_its_own_is_a_warning(tmp_path: Path) -> None:
    source = """
import torch, tiny_moe

class TinyForCausalLM(tiny_moe.TinyForCausalLM):
    def __init__(self, config, shard, plan):
        super().__init__(config, shard, plan)
        self.bias = torch.nn.Parameter(torch.ones(3, device="cpu"))
"""
    (warning,) = _inspect_source(tmp_path, source)["info"]["warnings"]
    assert "1 parameters name a device of their own and took real memory, bias first" in warning


def _runs(pid: int) -> bool:
    """Whether a process exists and is no zombie that waits to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
