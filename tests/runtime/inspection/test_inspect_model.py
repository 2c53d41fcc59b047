"""inspect_model through Ray: the driver stays clean, errors arrive typed, a script's own class travels by value."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.errors import (
    AcceleratorTouchError,
    ConfigError,
    InspectionCrashError,
    InspectionTimeoutError,
    ModelImportError,
    ModelNotFoundError,
    UnknownArchitectureError,
)
from moe_runtime.inspection import inspect_model

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "tiny_config.json"
QWEN3_NEXT_80B = FIXTURES / "qwen3_next_80b_config.json"


def _env(*folders: Path) -> dict[str, Any]:
    """A runtime environment whose workers look for modules in `folders`."""
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(map(str, folders))}}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
class TestThroughRay:
    def test_real_configuration_is_counted_in_little_memory(self) -> None:
        info = inspect_model(QWEN3_NEXT_80B, expert_parallel_size=64)
        assert info.architecture == "Qwen3NextForCausalLM"
        assert info.layer_types.count("full_attention") == 12
        assert info.layer_types.count("linear_attention") == 36
        assert info.moe_layers == tuple(range(48))
        assert (info.num_experts, info.num_experts_per_tok, info.max_model_len) == (512, 10, 262_144)
        assert info.parameters["expert"] == 48 * 512 * 3 * 512 * 2048
        # q with its gate, k, v, o and the two head norms, in each of 12 layers.
        attention = 2048 * 2 * 4096 + 2 * 2048 * 512 + 4096 * 2048 + 2 * 256
        assert info.parameters["attention"] == 12 * attention
        assert info.kv_bytes_per_token == 12 * 2 * 2 * 256 * 2
        # 32 value heads of 128 x 128 in float32, and 3 inputs of the convolution's channels in bfloat16.
        assert info.state_bytes_per_request == 36 * (32 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 32 * 128) * 2)
        assert info.tokenizer.eos_token_ids == (151_645,)
        assert info.inspection.peak_rss_bytes < 10**9

    def test_bytes_are_those_of_the_quantised_weights(self, tmp_path: Path) -> None:
        config = json.loads(QWEN3_NEXT_80B.read_text())
        fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": fp8}))
        whole, int8, on_gpus, on_cpus = (
            inspect_model(QWEN3_NEXT_80B),
            inspect_model(QWEN3_NEXT_80B, quantization="int8"),
            inspect_model(tmp_path),
            inspect_model(tmp_path, device="cpu"),
        )
        assert [i.quantization for i in (whole, int8, on_gpus, on_cpus)] == [None, "int8", "fp8", "fp8"]
        assert all(i.parameters == whole.parameters for i in (int8, on_gpus, on_cpus))
        experts = 48 * 512
        # A byte a weight, and a float32 for each row: gate's and up's of 512, down's of 2048.
        assert int8.parameter_bytes["expert"] == experts * (3 * 512 * 2048 + 4 * (2 * 512 + 2048))
        # The same with a float32 for each block.
        assert on_gpus.parameter_bytes["expert"] == experts * (3 * 512 * 2048 + 4 * 3 * 4 * 16)
        assert on_gpus.parameter_bytes["attention"] == whole.parameter_bytes["attention"]
        assert on_cpus.parameter_bytes == whole.parameter_bytes

    def test_answer_is_cached_for_the_next_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = inspect_model(TINY, model_class="tiny_moe:TinyForCausalLM", runtime_env=_env(FIXTURES))
        monkeypatch.setattr("moe_runtime.inspection.remote.inspect_remotely", None)
        assert first == inspect_model(
            TINY, model_class="tiny_moe:TinyForCausalLM", runtime_env=_env(FIXTURES)
        )

    def test_accelerator_touch_names_the_chain(self) -> None:
        with pytest.raises(AcceleratorTouchError) as caught:
            inspect_model(TINY, model_class="qwen3_next_vl:TouchyForCausalLM", runtime_env=_env(FIXTURES))
        text = str(caught.value)
        places = [text.index(f"{name} ({FIXTURES}/{name}.py:") for name in _CHAIN]
        assert places == sorted(places)
        assert "SM = torch.cuda.get_device_properties(dev).major" in text

    def test_import_error_says_what_is_missing_where(self) -> None:
        with pytest.raises(
            ModelImportError, match=r"No module named 'nobody_has_this'.*working_dir.*\(node "
        ) as e:
            inspect_model(TINY, model_class="nobody_has_this:Model")
        assert sys.executable in str(e.value)

    def test_crash_names_its_signal(self, tmp_path: Path) -> None:
        (tmp_path / "crashing.py").write_text("import ctypes\nctypes.string_at(0)\n")
        with pytest.raises(InspectionCrashError, match=r"SIGSEGV \(segmentation fault\)"):
            inspect_model(TINY, model_class="crashing:Model", runtime_env=_env(tmp_path))

    def test_hanging_import_is_killed(self, tmp_path: Path) -> None:
        source = f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
        (tmp_path / "hanging.py").write_text(source)
        with pytest.raises(InspectionTimeoutError, match="within 6 s and was killed"):
            inspect_model(TINY, timeout_s=6, model_class="hanging:Model", runtime_env=_env(tmp_path))
        assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()

    def test_inspecting_process_dies_with_its_task(self, tmp_path: Path) -> None:
        """As after Ctrl-C in the driver, which cancels the task by force."""
        import ray

        from moe_runtime.inspection.task import run_inspection
        from moe_runtime.registry import ModelTarget

        pid_file = tmp_path / "pid"
        (tmp_path / "hanging.py").write_text(
            f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
        )
        request = {
            "target": ModelTarget(architecture="X", import_path="hanging:Model").to_dict(),
            "config": {},
            "dtype": "float32",
            "quantization": None,
            "kept_quantization": None,
        }
        task = ray.remote(run_inspection).options(num_cpus=0, max_retries=0, runtime_env=_env(tmp_path))
        reference = task.remote(request, 120.0)
        assert _soon(lambda: pid_file.exists() and pid_file.read_text() != "")
        ray.cancel(reference, force=True)
        assert _soon(lambda: not Path(f"/proc/{pid_file.read_text()}").exists())

    def test_no_device_is_visible_to_the_inspection(self, tmp_path: Path) -> None:
        (tmp_path / "asking.py").write_text(
            "import os\nraise RuntimeError('visible: ' + repr(os.environ['CUDA_VISIBLE_DEVICES']))\n"
        )
        env = _env(tmp_path)
        env["env_vars"]["CUDA_VISIBLE_DEVICES"] = "16,17"
        with pytest.raises(ModelImportError, match="visible: ''"):
            inspect_model(TINY, model_class="asking:Model", runtime_env=env)

    def test_ep_size_beyond_the_experts_is_refused(self) -> None:
        options: dict[str, Any] = {
            "model_class": "tiny_moe:TinyForCausalLM",
            "runtime_env": _env(FIXTURES),
        }
        with pytest.raises(ConfigError, match="expert_parallel_size=6 is more than the 5 experts"):
            inspect_model(TINY, expert_parallel_size=6, **options)


_CHAIN = ("qwen3_next_vl", "qwen3_next", "mamba_mixer", "expert_parallel")


@pytest.mark.ray
def test_class_of_the_drivers_script_travels_by_value(tmp_path: Path) -> None:
    """The script starts its own Ray and never leaves its class in a file that a worker could import."""
    definitions = [(FIXTURES / name).read_text() for name in ("tiny_base.py", "tiny_layer.py", "tiny_moe.py")]
    own_imports = ("from tiny_base import TinyBase\n", "from tiny_layer import TinyExperts\n")
    source = "\n".join(definitions)
    for line in own_imports:
        source = source.replace(line, "")
    script = tmp_path / "script.py"
    script.write_text(f"""{source}
if __name__ == "__main__":
    import json, sys
    import ray
    from moe_runtime.inspection import inspect_model
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    info = inspect_model({str(TINY)!r}, model_class=TinyForCausalLM)
    print(json.dumps([info.model_class, info.parameters["expert"]]))
    ray.shutdown()
""")
    # Run as code, so that no script directory holds the class either.
    command = [sys.executable, "-c", script.read_text()]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, cwd=tmp_path.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["__main__:TinyForCausalLM (by value)", 480]


def test_driver_imports_neither_ray_nor_torch_to_load_the_module() -> None:
    script = (
        "import sys; import moe_runtime.inspection, moe_runtime.inspection.task; "
        "print([m for m in ('torch', 'ray', 'moe_models', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_unknown_architecture_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3NextForCausalLm"]}')
    with pytest.raises(UnknownArchitectureError, match="nearest: Qwen3NextForCausalLM"):
        inspect_model(tmp_path)


def test_broken_configuration_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        inspect_model(tmp_path / "nothing_here")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        inspect_model(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(ConfigError, match=r"config\.json, line 1"):
        inspect_model(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"timeout_s": 0}, "timeout_s must be"), ({"dtype": "int8"}, "dtype must be one of auto, float32")],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        inspect_model(TINY, model_class="a:B", **options)


def _soon(condition: Any, within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False
