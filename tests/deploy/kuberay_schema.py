"""JSON schemas of RayJob and RayService (ray.io/v1), of the fields that our manifests use and no others.

Names, types, choices and required fields are those of KubeRay 1.7's resource definitions, which are too large to keep
here; scripts/check_manifests.py takes the whole of them. A field that a manifest begins to use is added here, by them.
"""

from __future__ import annotations

from typing import Any

STRING = {"type": "string"}
INTEGER = {"type": "integer"}
BOOLEAN = {"type": "boolean"}
INTEGER_OR_STRING = {"type": ["integer", "string"]}


def _object(fields: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _map(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}


_PROBE = _object(
    {
        "httpGet": _object({"path": STRING, "port": INTEGER_OR_STRING}, "port"),
        "initialDelaySeconds": INTEGER,
        "periodSeconds": INTEGER,
        "timeoutSeconds": INTEGER,
        "failureThreshold": INTEGER,
    }
)
_CONTAINER = _object(
    {
        "name": STRING,
        "image": STRING,
        "env": _list(_object({"name": STRING, "value": STRING}, "name")),
        "ports": _list(_object({"containerPort": INTEGER, "name": STRING}, "containerPort")),
        "resources": _object({"requests": _map(INTEGER_OR_STRING), "limits": _map(INTEGER_OR_STRING)}),
        "readinessProbe": _PROBE,
        "livenessProbe": _PROBE,
        "volumeMounts": _list(
            _object({"name": STRING, "mountPath": STRING, "readOnly": BOOLEAN}, "mountPath", "name")
        ),
    },
    "name",
)
_VOLUME = _object(
    {
        "name": STRING,
        "persistentVolumeClaim": _object({"claimName": STRING}, "claimName"),
        "secret": _object({"secretName": STRING}),
        "emptyDir": _object({"medium": STRING, "sizeLimit": INTEGER_OR_STRING}),
    },
    "name",
)
_POD = _object(
    {
        "containers": _list(_CONTAINER),
        "tolerations": _list(_object({"key": STRING, "operator": STRING, "effect": STRING})),
        "volumes": _list(_VOLUME),
    },
    "containers",
)
_GROUP = {"rayStartParams": _map(STRING), "template": _object({"spec": _POD})}
_CLUSTER = _object(
    {
        "rayVersion": STRING,
        "authOptions": _object({"mode": {"type": "string", "enum": ["disabled", "token"]}}),
        "headGroupSpec": _object(_GROUP, "template"),
        "workerGroupSpecs": _list(
            _object(
                {
                    "groupName": STRING,
                    "replicas": INTEGER,
                    "minReplicas": INTEGER,
                    "maxReplicas": INTEGER,
                    **_GROUP,
                },
                "groupName",
                "maxReplicas",
                "minReplicas",
                "template",
            )
        ),
    },
    "headGroupSpec",
)
_SPECS = {
    "RayJob": _object(
        {
            "entrypoint": STRING,
            "submissionMode": STRING,
            "shutdownAfterJobFinishes": BOOLEAN,
            "ttlSecondsAfterFinished": INTEGER,
            "backoffLimit": INTEGER,
            "rayClusterSpec": _CLUSTER,
        }
    ),
    "RayService": _object(
        {
            "serviceUnhealthySecondThreshold": INTEGER,
            "deploymentUnhealthySecondThreshold": INTEGER,
            "serveConfigV2": STRING,
            "rayClusterConfig": _CLUSTER,
        },
        "rayClusterConfig",
    ),
}
# By kind.
SCHEMAS = {
    kind: _object(
        {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": kind},
            "metadata": _object({"name": STRING}, "name"),
            "spec": spec,
        },
        "apiVersion",
        "kind",
        "metadata",
        "spec",
    )
    for kind, spec in _SPECS.items()
}
