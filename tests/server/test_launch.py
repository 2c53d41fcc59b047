"""Settings from arguments by name, as Ray Serve passes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_runtime.cli.main import build_parser
from moe_runtime.config import EngineConfig
from moe_runtime.errors import ConfigError
from moe_runtime.server.config import ServerConfig
from moe_runtime.server.launch import ServeSettings, settings_from_mapping
from tests.source_tree import ROOT


def test_texts_become_what_the_fields_are(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n\n two \n")
    settings = settings_from_mapping(
        {
            "model": "some/model",
            "model_class": "package.module:Class",
            "name": "prod",
            "served_model_name": ["a", "b"],
            "expert_parallel_size": "4",
            "gpu_memory_utilization": "0.5",
            "enable_prefix_caching": "false",
            "max_model_len": "none",
            "api_key_file": str(keys),
            "request_timeout_s": "none",
            "max_n": 3,
            "max_stop_strings": "4",
            "num_replicas": "2",
        }
    )
    assert settings == ServeSettings(
        model="some/model",
        revision=None,
        model_class="package.module:Class",
        name="prod",
        num_replicas=2,
        engine=EngineConfig(expert_parallel_size=4, gpu_memory_utilization=0.5, enable_prefix_caching=False),
        server=ServerConfig(
            served_model_names=("a", "b"),
            model_root="some/model",
            api_keys=("one", "two"),
            request_timeout_s=None,
            max_n=3,
            max_stop=4,
        ),
    )


def test_nothing_is_the_demo() -> None:
    settings = settings_from_mapping({})
    assert (settings.model, settings.name) == (None, "serve")
    assert settings.server == ServerConfig(served_model_names=("demo",), model_root="demo")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"expert_parallel_sise": 2}, "did you mean 'expert_parallel_size'"),
        ({"expert_parallel_size": "two"}, "expert_parallel_size must be a whole number"),
        ({"num_replicas": "0"}, "num_replicas must be a whole number of at least 1, got '0'"),
        ({"per_expert_metrics": "maybe"}, "per_expert_metrics must be true or false, got 'maybe'"),
        (
            {"connect": "prod", "max_num_seqs": 4},
            "connect serves a deployment as it runs; leave out max_num_seqs",
        ),
        ({"max_n": "0"}, "max_n must be a whole number of at least 1"),
        ({"api_key_file": "/nowhere"}, "cannot read api_key_file /nowhere"),
    ],
)
def test_what_cannot_be_is_named(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings_from_mapping(args)


def test_the_class_of_the_model_reaches_the_start() -> None:
    settings = settings_from_mapping({"model_class": "no_colon"})
    with pytest.raises(ConfigError, match="no_colon"):
        settings.start("keeper")


def test_every_flag_of_serve_has_its_python_name_but_those_documented() -> None:
    flags = set(vars(build_parser().parse_args(["serve"]))) - {"func", "command"}
    refused = set()
    for name in flags:
        try:
            settings_from_mapping({name: None})
        except ConfigError as error:
            if "has no argument" in str(error):
                refused.add(name)
    listener = {"ingress", "host", "port", "ssl_certfile", "ssl_keyfile"}
    assert refused == listener | {"ray_metrics", "shutdown_timeout", "uvicorn_log_level"}
    documented = (ROOT / "docs" / "serving.md").read_text()
    assert not [name for name in refused if f"`{name}`" not in documented]
