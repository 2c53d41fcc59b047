"""Importing any module of ours touches no accelerator, and the driver's modules need no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import ROOT, find_modules, package_folders

TOUCHES = {
    "reads_properties": "import torch\ntorch.cuda.get_device_properties(0)",
    "asks_the_current_device": "from torch.cuda import current_device\ncurrent_device()",
    "makes_a_tensor": "import torch\ntorch.zeros(1, device='cuda')",
    "swallows_its_touch": "import torch\ntry:\n    torch.cuda.init()\nexcept RuntimeError:\n    pass",
    "loads_the_driver": "import ctypes\ntry:\n    ctypes.CDLL('libcuda.so.1')\nexcept OSError:\n    pass",
    "loads_nvml": "import ctypes\ntry:\n    ctypes.CDLL('libnvidia-ml.so.1')\nexcept OSError:\n    pass",
    "asks_triton": "import triton\ntriton.runtime.driver.active.get_current_device()",
    "asks_for_cuda": "import torch\nHAS_CUDA = torch.cuda.is_available()",
    "counts_devices": "import torch\nDEVICES = torch.cuda.device_count()",
}


def _touches(modules: list[str], folders: list[Path], **env: str) -> dict[str, list[str]]:
    """Import `modules`, found in `folders`, in a process of their own; what each touched."""
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "import_trap.py"), *modules],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("visible_devices", [None, "", "16,17"])
def test_no_module_touches_an_accelerator_when_imported(
    visible_devices: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    env = {} if visible_devices is None else {"CUDA_VISIBLE_DEVICES": visible_devices}

    assert _touches(sorted(find_modules()), package_folders(), **env) == {}


def test_every_kind_of_touch_is_found_with_its_module_and_line(tmp_path: Path) -> None:
    ours, library = tmp_path / "ours", tmp_path / "library"
    ours.mkdir()
    library.mkdir()
    for name, source in TOUCHES.items():
        (ours / f"{name}.py").write_text(source + "\n")
    (library / "asking_library.py").write_text("import torch\nassert not torch.cuda.is_available()\n")
    (ours / "innocent.py").write_text(
        f"import sys\nsys.path.append({str(library)!r})\nimport asking_library\n"
    )

    found = _touches([*TOUCHES, "innocent"], [ours])

    assert set(found) == set(TOUCHES)
    for name, touches in found.items():
        assert any(f"({ours / name}.py:" in touch for touch in touches), touches


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import moe_runtime", "ray rich torch transformers triton"),
        ("import moe_runtime.cli.main", "ray torch transformers triton huggingface_hub"),
        (
            "from moe_runtime import LLM, SamplingParams, inspect_model",
            "torch transformers triton huggingface_hub",
        ),
        ("import moe_runtime.engine", "torch transformers triton huggingface_hub"),
        *(
            (
                f"from moe_runtime.cli.main import build_parser as b; b().parse_args({args!r})",
                "ray torch transformers triton",
            )
            for args in (["--help"], ["generate", "--help"], ["inspect", "--help"], ["--version"])
        ),
    ],
)
def test_the_driver_imports_nothing_heavy_before_it_runs(statement: str, forbidden: str) -> None:
    program = (
        "import contextlib, io, sys\n"
        "try:\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        f"        {statement}\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print(*sorted(set(sys.modules) & set(sys.argv[1:])))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, *forbidden.split()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, package_folders()))},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == []
