"""Check the manifests in deploy/kuberay against KubeRay's own resource definitions.

    python scripts/check_manifests.py FOLDER

FOLDER holds the operator's custom resource definitions as YAML: helm-chart/kuberay-operator/crds of its repository,
or what `kubectl get crd rayjobs.ray.io rayservices.ray.io -o yaml` prints. A field that they do not have is an error,
as it is for `kubectl apply --validate=strict`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

MANIFESTS = Path(__file__).resolve().parents[1] / "deploy" / "kuberay"


def strict(schema: Any) -> Any:
    """The schema with every field refused that it does not name."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(value) for key, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not open_ended:
        made["additionalProperties"] = False
    return made


def schemas(folder: Path) -> dict[tuple[str, str], Any]:
    """Schema of each (apiVersion, kind) that the definitions in a folder have."""
    found = {}
    for definition in _definitions(folder):
        spec = definition["spec"]
        for version in spec["versions"]:
            key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
            schema = strict(version["schema"]["openAPIV3Schema"])
            # The API server checks these itself, by types that a custom resource's schema does not name.
            schema["properties"]["metadata"] = {"type": "object"}
            found[key] = schema
    return found


def _definitions(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            for item in document.get("items", [document]):
                if item.get("kind") == "CustomResourceDefinition":
                    yield item


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    known = schemas(Path(sys.argv[1]))
    if not known:
        print(f"{sys.argv[1]} has no custom resource definitions", file=sys.stderr)
        return 2
    failures = 0
    for file in sorted(MANIFESTS.glob("*.yaml")):
        for manifest in yaml.safe_load_all(file.read_text()):
            schema = known.get((manifest["apiVersion"], manifest["kind"]))
            if schema is None:
                print(f"{file.name}: {manifest['kind']} is not KubeRay's, not checked")
                continue
            errors = list(jsonschema.Draft202012Validator(schema).iter_errors(manifest))
            failures += len(errors)
            for error in errors:
                print(f"{file.name}: {error.json_path}: {error.message[:300]}")
            if not errors:
                print(f"{file.name}: {manifest['kind']} is valid")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
