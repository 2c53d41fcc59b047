"""ServeSettings: what to serve and how, from arguments by their Python names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_runtime.config import EngineConfig
from moe_runtime.errors import ConfigError, refuse_unknown
from moe_runtime.frontend import Frontend
from moe_runtime.server.config import ServerConfig, find_api_keys, read_setting

DEFAULT_NAME = "serve"
_LISTS = ("served_model_name", "api_key", "allowed_origins")
_FILES = ("api_key_file", "chat_template")
_DEPLOYED = ("model", "revision", "model_class", "name")
_OWN = (*_DEPLOYED, "connect", "num_replicas", "per_expert_metrics", *_LISTS, *_FILES)
# Flags that ServerConfig calls otherwise.
_FLAGS = {"max_stop_strings": "max_stop", "request_timeout": "request_timeout_s"}
_ENGINE = {field.name: field for field in dataclasses.fields(EngineConfig)}
_SERVER = {
    field.name: field
    for field in dataclasses.fields(ServerConfig)
    if field.name not in ("served_model_names", "model_root", "api_keys", *_LISTS, *_FILES)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """A deployment of ranks and the server in front of it; made by `settings_from_mapping`."""

    model: str | None  # None: the demo checkpoint
    revision: str | None
    model_class: str | None = None  # "module:Class"; None: the registered one
    name: str  # of the deployment, which is the application's own
    connect: str | None = None  # name of a deployment that runs already, to be served in its stead
    num_replicas: int = 1  # of the server
    engine: EngineConfig
    server: ServerConfig
    per_expert_metrics: bool = False

    def start(self, keeper: str) -> Frontend:
        """Start the ranks, for `keeper` to end; raises what `Frontend.start` raises."""
        return Frontend.start(
            self.model,
            config=self.engine,
            revision=self.revision,
            model_class=self.model_class,
            name=self.name,
            use_tqdm=False,
            keeper=keeper,
        )


def settings_from_mapping(args: Mapping[str, Any]) -> ServeSettings:
    """Settings from EngineConfig's and ServerConfig's fields, and `model`, `revision`, `model_class`, `name`
    ("serve" by default), `connect`, `num_replicas`, `served_model_name`, `api_key`, `api_key_file`,
    `chat_template` (a file), `per_expert_metrics`. MOE_RUNTIME_API_KEY is one more key.

    Values may be texts, as `serve run` passes them.

    Raises:
        ConfigError: an argument is unknown or cannot be used.
    """
    refuse_unknown(args, [*_OWN, *_ENGINE, *_SERVER, *_FLAGS], "moe_runtime.server.ray_serve:build")
    args = {_FLAGS.get(name, name): value for name, value in args.items()}
    if str(args.get("request_timeout_s")) == "0":
        args["request_timeout_s"] = None
    connect = args.get("connect")
    if connect is not None and (own := [name for name in args if name in (*_DEPLOYED, *_ENGINE)]):
        raise ConfigError(f"connect serves a deployment as it runs; leave out {', '.join(own)}")
    model = args.get("model") or connect
    server = ServerConfig(
        served_model_names=_listed(args.get("served_model_name")) or (model or "demo",),
        model_root=model or "demo",
        api_keys=find_api_keys(_listed(args.get("api_key")), args.get("api_key_file"), "api_key_file"),
        allowed_origins=_listed(args.get("allowed_origins")),
        chat_template=read_setting(args.get("chat_template"), "chat_template"),
        **{name: _value(field, args[name]) for name, field in _SERVER.items() if name in args},
    )
    return ServeSettings(
        model=args.get("model"),
        connect=connect,
        num_replicas=_count("num_replicas", args.get("num_replicas", 1)),
        revision=args.get("revision"),
        model_class=args.get("model_class"),
        name=args.get("name", DEFAULT_NAME),
        engine=EngineConfig(
            **{name: _value(field, args[name]) for name, field in _ENGINE.items() if name in args}
        ),
        server=server,
        per_expert_metrics=_flag("per_expert_metrics", args.get("per_expert_metrics", False)),
    )


def _value(field: dataclasses.Field[Any], given: Any) -> Any:
    """A text as the field's type has it; what cannot be read so is left to the class's own check."""
    if not isinstance(given, str):
        return given
    kinds = str(field.type).split(" | ")
    if "None" in kinds and given.lower() in ("none", "null", ""):
        return None
    if "bool" in kinds and given.lower() in ("true", "false", "1", "0"):
        return given.lower() in ("true", "1")
    for name, kind in (("int", int), ("float", float)):
        if name in kinds:
            try:
                return kind(given)
            except ValueError:
                continue
    return given


def _count(name: str, given: Any) -> int:
    value = int(given) if isinstance(given, str) and given.isdecimal() else given
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {given!r}")
    return value


def _flag(name: str, given: Any) -> bool:
    value = {"true": True, "1": True, "false": False, "0": False}.get(str(given).lower())
    if value is None:
        raise ConfigError(f"{name} must be true or false, got {given!r}")
    return value


def _listed(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)
