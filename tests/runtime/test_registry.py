"""Registry: names to lazy targets, plug-ins, classes by reference and by value, and what is refused."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from moe_models.interfaces import CausalLM
from moe_runtime.errors import ConfigError, UnknownArchitectureError
from moe_runtime.registry import ENTRY_POINT_GROUP, ModelTarget, Registry, resolve_target


def _install_plugin(folder: Path, name: str, version: str, value: str) -> None:
    """A distribution's metadata that names a model; its module does not exist."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\nMambaMoeForCausalLM = {value}\n")


@pytest.fixture
def site_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_built_in_architecture_is_a_lazy_target() -> None:
    target = Registry().lookup("Qwen3NextForCausalLM")
    assert target.import_path == "moe_models.qwen3_next:Qwen3NextForCausalLM"
    assert target.pickled is None


def test_naming_a_target_imports_neither_torch_nor_the_model() -> None:
    script = (
        "import sys; from moe_runtime.registry import Registry, resolve_target; "
        "resolve_target({'architectures': ['Qwen3NextForCausalLM']}); Registry().names(); "
        "print([m for m in ('torch', 'moe_models', 'ray', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_unknown_architecture_names_the_nearest_all_known_and_the_way_to_register() -> None:
    with pytest.raises(UnknownArchitectureError) as caught:
        Registry().lookup("Qwen3NextForCausalLm")
    text = str(caught.value)
    assert "unknown architecture 'Qwen3NextForCausalLm'; nearest: Qwen3NextForCausalLM; known: " in text
    assert 'entry point in group "moe_runtime.models"' in text
    assert "--model-class module:Class" in text
    assert caught.value.exit_status == 2


def test_plugin_is_found_without_being_imported(site_dir: Path) -> None:
    _install_plugin(site_dir, "mamba_moe", "1.2", "mamba_moe.model:MambaMoe")
    registry = Registry()
    assert "MambaMoeForCausalLM" in registry.names()
    target = registry.lookup("MambaMoeForCausalLM")
    assert (target.import_path, target.provider) == ("mamba_moe.model:MambaMoe", "mamba_moe==1.2")
    assert "mamba_moe" not in sys.modules


def test_two_plugins_with_one_name_are_refused(site_dir: Path) -> None:
    _install_plugin(site_dir, "mamba_moe", "1.2", "mamba_moe.model:MambaMoe")
    _install_plugin(site_dir, "other_moe", "3", "other_moe:Model")
    with pytest.raises(ConfigError, match=r"more than once: .*other_moe:Model by other_moe==3"):
        Registry().lookup("MambaMoeForCausalLM")


def test_broken_plugin_harms_only_its_own_name(site_dir: Path) -> None:
    _install_plugin(site_dir, "mamba_moe", "1.2", "no-colon-here")
    assert Registry().lookup("Qwen3NextForCausalLM").provider is None
    with pytest.raises(ConfigError, match=r"mamba_moe==1\.2.*'module:Class', got 'no-colon-here'"):
        Registry().lookup("MambaMoeForCausalLM")


def test_model_class_text_wins_over_the_registry() -> None:
    target = resolve_target({"architectures": ["Qwen3NextForCausalLM"]}, "my_models.moe:Mine")
    assert (target.architecture, target.import_path) == ("Qwen3NextForCausalLM", "my_models.moe:Mine")


@pytest.mark.parametrize(
    "text", ["my_models", "my models:Mine", ":Mine", "my_models:", "a:b:c", "my-models:Mine"]
)
def test_malformed_model_class_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="written 'module:Class', got"):
        resolve_target({"architectures": ["X"]}, text)


def test_model_class_that_is_no_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="'module:Class' or a class, got 3"):
        resolve_target({"architectures": ["X"]}, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"architectures": None}])
def test_configuration_without_architecture_needs_a_model_class(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="names no architecture"):
        resolve_target(config)
    assert resolve_target(config, "m:Mine").architecture == "Mine"


def test_architectures_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be a list of names"):
        resolve_target({"architectures": "Qwen3NextForCausalLM"})


def test_importable_class_goes_by_reference() -> None:
    target = resolve_target({}, CausalLM)
    assert (target.import_path, target.pickled) == ("moe_models.interfaces:CausalLM", None)
    assert target.load() is CausalLM


def test_class_of_a_function_goes_by_value() -> None:
    class Local(CausalLM):
        marker = "shipped"

    target = resolve_target({}, Local)
    assert target.pickled is not None
    assert target.display_name.endswith("Local (by value)")
    assert target.load().marker == "shipped"  # type: ignore[attr-defined]


def test_target_survives_pickling_and_json() -> None:
    target = ModelTarget(architecture="A", import_path="m:C", pickled=b"\x00\xff", provider="p==1")
    assert pickle.loads(pickle.dumps(target)) == target
    assert ModelTarget.from_dict(target.to_dict()) == target


def test_loading_something_else_than_a_causal_lm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be a subclass of moe_models\.interfaces\.CausalLM"):
        ModelTarget(architecture="A", import_path="pathlib:Path").load()
    with pytest.raises(ConfigError, match=r"has no 'Pth'; did you mean 'Path'\?"):
        ModelTarget(architecture="A", import_path="pathlib:Pth").load()
