"""Registry: architecture name to lazy `"module:Class"` target; nothing is imported until a target is loaded."""

from __future__ import annotations

import base64
import importlib
import importlib.metadata
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_runtime.errors import ConfigError, UnknownArchitectureError, did_you_mean, nearest

ENTRY_POINT_GROUP = "moe_runtime.models"

BUILT_IN_MODELS: Mapping[str, str] = {
    "Qwen3NextForCausalLM": "moe_models.qwen3_next:Qwen3NextForCausalLM",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTarget:
    """A model class that is not loaded yet: by reference, or by value for one that cannot be imported elsewhere.

    Small and picklable, so that the inspection task and the workers load the very same class.
    """

    architecture: str
    import_path: str  # "module:Class"; for a class shipped by value only its name for messages
    pickled: bytes | None = field(default=None, repr=False)  # cloudpickle of the class; None: by reference
    provider: str | None = None  # "name==version" of the distribution whose entry point named it

    @property
    def display_name(self) -> str:
        """`"module:Class"`, with a note for a class shipped by value."""
        return self.import_path if self.pickled is None else f"{self.import_path} (by value)"

    def load(self) -> type:
        """Import or unpickle the class. Whatever its module raises passes through.

        Raises ConfigError where the module has no such class, or it is no CausalLM.
        """
        if self.pickled is not None:
            loaded = pickle.loads(self.pickled)
        else:
            module_name, _, qualname = self.import_path.partition(":")
            loaded = importlib.import_module(module_name)
            for part in qualname.split("."):
                if not hasattr(loaded, part):
                    raise ConfigError(
                        f"model class {self.import_path!r}: module {module_name!r} has no {part!r}"
                        f"{did_you_mean(part, vars(loaded))}"
                    )
                loaded = getattr(loaded, part)
        # Imported here because the interface needs torch, and naming a target must not.
        from moe_models.interfaces import CausalLM

        if not (isinstance(loaded, type) and issubclass(loaded, CausalLM)):
            raise ConfigError(
                f"model class {self.import_path!r} is {loaded!r}; it must be a subclass of "
                f"moe_models.interfaces.CausalLM"
            )
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """Plain values that survive JSON."""
        pickled = None if self.pickled is None else base64.b64encode(self.pickled).decode("ascii")
        return {
            "architecture": self.architecture,
            "import_path": self.import_path,
            "pickled": pickled,
            "provider": self.provider,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelTarget:
        """Inverse of `to_dict`."""
        pickled = None if data["pickled"] is None else base64.b64decode(data["pickled"])
        return cls(**{**data, "pickled": pickled})


class Registry:
    """Architectures known here: the built-in ones and those of installed plug-ins, which win on equal names."""

    def __init__(self, built_in: Mapping[str, str] = BUILT_IN_MODELS) -> None:
        self._built_in = dict(built_in)

    def names(self) -> list[str]:
        """Every known architecture, sorted."""
        return sorted({*self._built_in, *_plugin_entry_points()})

    def lookup(self, architecture: str) -> ModelTarget:
        """The target of an architecture.

        Raises:
            UnknownArchitectureError: with the nearest names, all known ones and how to register another.
            ConfigError: two plug-ins claim the name, or one does it with something else than `module:Class`.
        """
        plugins = _plugin_entry_points()
        if architecture in plugins:
            return _plugin_target(architecture, plugins[architecture])
        if architecture in self._built_in:
            return ModelTarget(architecture=architecture, import_path=self._built_in[architecture])
        known = sorted({*self._built_in, *plugins})
        close = nearest(architecture, known)
        hint = f"; nearest: {', '.join(close)}" if close else ""
        raise UnknownArchitectureError(
            f"unknown architecture {architecture!r}{hint}; known: {', '.join(known)}. Register one with an entry "
            f'point in group "{ENTRY_POINT_GROUP}" ({architecture} = "module:Class"), or pass '
            f"--model-class module:Class (model_class= in Python)"
        )


def _plugin_entry_points() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """What installed distributions declare; reads their metadata and imports none of them."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def _plugin_target(architecture: str, points: list[importlib.metadata.EntryPoint]) -> ModelTarget:
    claims = {p.value: f"{p.dist.name}=={p.dist.version}" if p.dist else "an unknown plug-in" for p in points}
    if len(claims) > 1:
        texts = ", ".join(f"{value} by {provider}" for value, provider in claims.items())
        raise ConfigError(
            f"architecture {architecture!r} is registered more than once: {texts}; uninstall all but one, or pass "
            f"--model-class module:Class"
        )
    ((value, provider),) = claims.items()
    path = _checked_import_path(value, f"entry point {architecture!r} of {provider}")
    return ModelTarget(architecture=architecture, import_path=path, provider=provider)


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The first of config.json's `architectures`, or None where it names none.

    Raises ConfigError where the key holds something else than a list of names.
    """
    names = config.get("architectures")
    if names is None or names == []:
        return None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ConfigError(
            f'config.json: architectures must be a list of names such as ["Qwen3NextForCausalLM"], got {names!r}'
        )
    return names[0]


def resolve_target(
    config: Mapping[str, Any], model_class: str | type | None = None, registry: Registry | None = None
) -> ModelTarget:
    """The class that serves a parsed config.json: `model_class` where given, else by its architecture.

    Raises:
        UnknownArchitectureError: no such architecture is registered.
        ConfigError: config.json names no architecture, or `model_class` is not usable.
    """
    architecture = architecture_of(config)
    if model_class is None:
        if architecture is None:
            raise ConfigError(
                'config.json names no architecture; add e.g. "architectures": ["Qwen3NextForCausalLM"], or pass '
                "--model-class module:Class"
            )
        return (registry or Registry()).lookup(architecture)
    if isinstance(model_class, str):
        path = _checked_import_path(model_class, "--model-class")
        return ModelTarget(architecture=architecture or path.partition(":")[2], import_path=path)
    if not isinstance(model_class, type):
        raise ConfigError(f"model_class must be 'module:Class' or a class, got {model_class!r}")
    path = f"{model_class.__module__}:{model_class.__qualname__}"
    return ModelTarget(
        architecture=architecture or model_class.__name__,
        import_path=path,
        pickled=_by_value(model_class),
    )


def _by_value(cls: type) -> bytes | None:
    """The pickled class where other processes cannot import it: a script's, a notebook's or a function's own."""
    if cls.__module__ != "__main__" and "<locals>" not in cls.__qualname__:
        return None
    import cloudpickle

    data: bytes = cloudpickle.dumps(cls)
    return data


def _checked_import_path(path: str, origin: str) -> str:
    module, colon, qualname = path.partition(":")
    if not (colon and all(p.isidentifier() for p in (*module.split("."), *qualname.split(".")))):
        raise ConfigError(f"{origin}: a model class is written 'module:Class', got {path!r}")
    return path
