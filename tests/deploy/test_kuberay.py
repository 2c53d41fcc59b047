"""The manifests for KubeRay agree with its API, each other, our command line, our server and Ray Serve's own schema.

KubeRay's resource definitions ship in no package; kuberay_schema.py has what the manifests use of them, and
scripts/check_manifests.py checks against a copy of the whole.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from moe_runtime.cli.main import build_parser
from moe_runtime.errors import ConfigError
from moe_runtime.server.launch import ServeSettings, settings_from_mapping
from tests.deploy.kuberay_schema import SCHEMAS
from tests.source_tree import ROOT

FOLDER = ROOT / "deploy" / "kuberay"
MANIFESTS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(FOLDER.glob("*.yaml"))}
JOBS = ("rayjob-batch", "rayjob-serve")
CLUSTERS = (*JOBS, "rayservice")


def _cluster(name: str) -> dict[str, Any]:
    spec = MANIFESTS[name]["spec"]
    return spec["rayClusterConfig" if name == "rayservice" else "rayClusterSpec"]


def _groups(name: str) -> Iterator[dict[str, Any]]:
    cluster = _cluster(name)
    yield cluster["headGroupSpec"]
    yield from cluster["workerGroupSpecs"]


def test_every_manifest_is_known_here() -> None:
    kinds = {name: (manifest["apiVersion"], manifest["kind"]) for name, manifest in MANIFESTS.items()}
    assert kinds == {
        "api-keys": ("v1", "Secret"),
        "rayjob-batch": ("ray.io/v1", "RayJob"),
        "rayjob-serve": ("ray.io/v1", "RayJob"),
        "rayservice": ("ray.io/v1", "RayService"),
        "weights": ("v1", "PersistentVolumeClaim"),
    }


def _faults(manifest: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMAS[manifest["kind"]])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@pytest.mark.parametrize("name", CLUSTERS)
def test_fields_have_the_names_and_types_of_kuberay(name: str) -> None:
    assert _faults(MANIFESTS[name]) == []


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_misspelt_a_mistyped_and_a_missing_field_would_be_found(name: str) -> None:
    manifest = copy.deepcopy(MANIFESTS[name])
    (group,) = manifest["spec"]["rayClusterConfig" if name == "rayservice" else "rayClusterSpec"][
        "workerGroupSpecs"
    ]
    del group["minReplicas"]
    group["maxReplica"] = group.pop("maxReplicas")
    group["rayStartParams"]["num-cpus"] = 0
    found = "\n".join(_faults(manifest))
    for words in ("'minReplicas' is a required", "'maxReplica' was unexpected", "0 is not of type 'string'"):
        assert words in found


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_run_the_version_of_ray_that_the_project_needs(name: str) -> None:
    cluster = _cluster(name)
    assert cluster["rayVersion"].split(".")[:2] == ray.__version__.split(".")[:2]
    assert {group["template"]["spec"]["containers"][0]["image"] for group in _groups(name)} == {
        "REGISTRY/moe-runtime:0.1.0"
    }


@pytest.mark.parametrize("name", CLUSTERS)
def test_gpus_are_on_workers_only(name: str) -> None:
    head, *workers = (group["template"]["spec"]["containers"][0]["resources"] for group in _groups(name))
    assert "nvidia.com/gpu" not in head["limits"]
    assert all(int(worker["limits"]["nvidia.com/gpu"]) > 0 for worker in workers)
    assert _cluster(name)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_ray_container_is_probed_and_finds_the_weights(name: str) -> None:
    for group in _groups(name):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert {"name": "RAY_worker_niceness", "value": "0"} in container["env"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == set(volumes)
        assert mounts["weights"] == "/weights"
        claim = volumes["weights"]["persistentVolumeClaim"]["claimName"]
        assert claim == MANIFESTS["weights"]["metadata"]["name"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_worker_group_has_the_gpus_of_the_deployment(name: str) -> None:
    (group,) = _cluster(name)["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    if name == "rayservice":
        ranks = _application()["args"]["expert_parallel_size"]
    else:
        ranks = _arguments(name).expert_parallel_size
    assert group["minReplicas"] * gpus >= ranks


@pytest.mark.parametrize("name", ["rayjob-serve", "rayservice"])
def test_servers_ask_for_the_keys_of_the_secret(name: str) -> None:
    secret = MANIFESTS["api-keys"]
    given = _application()["args"] if name == "rayservice" else vars(_arguments(name))
    folder, key = given["api_key_file"].rsplit("/", 1)
    assert key in secret["stringData"]
    # A job's driver is on the head; Ray Serve builds the application, and reads the keys, wherever it likes.
    groups = list(_groups(name)) if name == "rayservice" else [_cluster(name)["headGroupSpec"]]
    for group in groups:
        pod = group["template"]["spec"]
        mount = {"name": "api-keys", "mountPath": folder, "readOnly": True}
        assert mount in pod["containers"][0]["volumeMounts"]
        assert {"name": "api-keys", "secret": {"secretName": secret["metadata"]["name"]}} in pod["volumes"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_s_command_is_one_that_the_parser_takes_and_its_cluster_ends_with_it(name: str) -> None:
    assert _arguments(name).model == "/weights/MODEL"
    spec = MANIFESTS[name]["spec"]
    assert (spec["submissionMode"], spec["shutdownAfterJobFinishes"]) == ("K8sJobMode", True)


def test_ray_serve_accepts_the_service_s_configuration() -> None:
    config = yaml.safe_load(MANIFESTS["rayservice"]["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.import_path == "moe_runtime.server.ray_serve:build"
    assert schema.http_options.port == 8000


def _settings(args: dict[str, Any], tmp_path: Path) -> ServeSettings:
    """What the server makes of the arguments where the secret is mounted."""
    keys = tmp_path / "api-keys"
    keys.write_text(MANIFESTS["api-keys"]["stringData"]["api-keys"])
    return settings_from_mapping({**args, "api_key_file": str(keys)})


def test_the_server_accepts_the_service_s_arguments(tmp_path: Path) -> None:
    args = _application()["args"]
    settings = _settings(args, tmp_path)
    assert (settings.model, settings.server.served_model_names) == ("/weights/MODEL", ("MODEL",))
    assert (settings.engine.device, settings.engine.expert_parallel_size) == (
        "cuda",
        args["expert_parallel_size"],
    )
    assert "replace-this-key" in settings.server.api_keys
    with pytest.raises(ConfigError, match="'expert_paralel_size'; did you mean 'expert_parallel_size'"):
        _settings({**args, "expert_paralel_size": 8}, tmp_path)


def _application() -> dict[str, Any]:
    (application,) = yaml.safe_load(MANIFESTS["rayservice"]["spec"]["serveConfigV2"])["applications"]
    return application


def _arguments(name: str) -> Any:
    program, *arguments = shlex.split(MANIFESTS[name]["spec"]["entrypoint"])
    assert program == "moe-runtime"
    return build_parser().parse_args(arguments)
