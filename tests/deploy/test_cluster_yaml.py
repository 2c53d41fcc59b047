"""cluster.yaml is what Ray's cluster launcher takes, by Ray's own code; so is its variant for machines of one's own."""

from __future__ import annotations

import argparse
import re
import shlex
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from moe_runtime.cli.main import build_parser
from tests.source_tree import ROOT

FILE = ROOT / "cluster.yaml"
PREMISES = "# on-premise:\n"
# From AWS's own pages of these types; the cluster's file names them, and Ray asks AWS for the same.
GPUS_OF_INSTANCE = {"g6e.12xlarge": 4, "p4d.24xlarge": 8, "p5.48xlarge": 8, "p6-b200.48xlarge": 8}


def _aws() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def _on_premise() -> dict[str, Any]:
    """The file with the commented variant in the place of what it replaces."""
    _, block = FILE.read_text().split(PREMISES)
    variant = yaml.safe_load("".join(line.removeprefix("#") for line in block.splitlines(keepends=True)))
    config = {**_aws(), **variant}
    return {
        key: value for key, value in config.items() if key not in ("available_node_types", "head_node_type")
    }


@pytest.mark.parametrize("config", [_aws(), _on_premise()], ids=["aws", "local"])
def test_ray_accepts_it(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    validate_config(prepared)
    workers = [
        kind
        for name, kind in prepared["available_node_types"].items()
        if name != config.get("head_node_type") and kind["max_workers"] > 0
    ]
    assert workers
    assert all(0 < kind["min_workers"] <= kind["max_workers"] for kind in workers)


def test_a_misspelt_key_would_be_found() -> None:
    with pytest.raises(Exception, match="setup_command"):
        validate_config(prepare_config({**_aws(), "setup_command": []}))


def test_ranks_stay_off_the_head_and_start_at_full_priority() -> None:
    config = _aws()
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    start = {name: config[f"{name}_start_ray_commands"][-1] for name in ("head", "worker")}
    assert "--num-cpus=0" in start["head"]
    for command in start.values():
        assert "RAY_worker_niceness=0" in command
        assert "RAY_AUTH_MODE=" in command
        # Where the project is installed, so that a job's python finds it.
        assert command.startswith(". ~/moe-env/bin/activate && ")
    assert any("~/moe-env/bin/python -m pip install" in line for line in config["setup_commands"])


@pytest.mark.parametrize("page", ["README.md", "docs/deployment.md"])
def test_the_machines_that_start_with_it_have_the_gpus_of_the_documented_commands(page: str) -> None:
    workers = _aws()["available_node_types"]["gpu-worker"]
    gpus = workers["min_workers"] * GPUS_OF_INSTANCE[workers["node_config"]["InstanceType"]]
    commands = _commands_of_jobs(page)
    assert [command.expert_parallel_size for command in commands if command.expert_parallel_size > gpus] == []
    assert {command.device for command in commands} == {"cuda"}
    # `ray up` returns while machines boot, and install for minutes.
    assert commands[0].placement_timeout_s >= 900


def _commands_of_jobs(page: str) -> list[argparse.Namespace]:
    """What follows `-- python -m moe_runtime` on a page, as our parser reads it."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    found = re.findall(r" -- +python -m moe_runtime (.*--expert-parallel-size.*)$", text, flags=re.MULTILINE)
    assert found
    return [build_parser().parse_args(shlex.split(arguments)) for arguments in found]
