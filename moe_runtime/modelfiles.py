"""Find a model's files: a local directory, a config.json, a Hub id, or the packaged demo checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from moe_runtime.errors import CheckpointError, ConfigError, ModelNotFoundError

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
DEMO_NAME = "demo"

_DTYPES = ("float32", "bfloat16", "float16")
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Where a model's files lie, and the small ones parsed. Set by `resolve_model`."""

    name: str  # as the user gave it, or "demo"
    path: Path  # the directory
    config: dict[str, Any]  # config.json; has a non-empty "architectures"
    generation_config: dict[str, Any]  # generation_config.json; {} where there is none
    tokenizer_config: dict[str, Any] | None  # tokenizer_config.json

    def shard_of_tensor(self) -> dict[str, str] | None:
        """Tensor name -> shard file name, as the shard index says; None for a single-file checkpoint."""
        if (self.path / WEIGHTS_FILE).is_file() or not (self.path / WEIGHTS_INDEX_FILE).is_file():
            return None
        file = self.path / WEIGHTS_INDEX_FILE
        shards = read_json_object(file).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
            raise CheckpointError(f"{file} has no 'weight_map' object of tensor names to shard files")
        outside = [s for s in shards.values() if Path(s).name != s]
        if outside:
            raise CheckpointError(
                f"{file} names the shard {outside[0]!r}; shards must lie in {self.path} itself"
            )
        return shards

    def weight_files(self) -> list[Path]:
        """The safetensors files: the single file, or the shards in the order of their names.

        Raises CheckpointError where there are none, or where a shard that the index names is missing.
        """
        if (self.path / WEIGHTS_FILE).is_file():
            return [self.path / WEIGHTS_FILE]
        shard_of_tensor = self.shard_of_tensor()
        if shard_of_tensor is None:
            raise CheckpointError(_no_weights_message(self.path))
        shards = sorted(set(shard_of_tensor.values()))
        missing = [name for name in shards if not (self.path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.path} lacks {len(missing)} of the {len(shards)} shards that {WEIGHTS_INDEX_FILE} names: "
                f"{_some(missing)}; download the model again, or copy them there"
            )
        return [self.path / name for name in shards]


def resolve_model(
    model: str | os.PathLike[str] | None, revision: str | None = None, *, config_only: bool = False
) -> ModelFiles:
    """Find the files of `model` and parse the small ones.

    Args:
        model: a directory, the path of a `config.json` (enough to inspect), a Hub id such as
            `Qwen/Qwen3-Next-80B-A3B-Instruct`, or None for the demo checkpoint that ships with the package.
        revision: branch, tag or commit of a Hub id; ignored for local files.
        config_only: of a Hub id, download everything but the weights.

    Raises:
        ModelNotFoundError: no such directory or Hub id, or it holds no config.json.
        ConfigError: a JSON file is broken, or config.json names no architecture.
    """
    if model is None:
        directory = Path(str(resources.files("moe_runtime"))) / "demo_checkpoint"
        return _read_directory(DEMO_NAME, directory, directory / "config.json")
    name = os.fspath(model)
    if not name.strip():
        raise ModelNotFoundError("the model's name is empty; give a directory or a Hub id")
    path = Path(name).expanduser().absolute()  # ranks have a working directory of their own
    if path.is_dir():
        return _read_directory(name, path, path / "config.json")
    if path.is_file():
        if path.suffix != ".json":
            raise ModelNotFoundError(f"{path} is a file; give the model's directory, or its config.json")
        return _read_directory(name, path.parent, path)
    if isinstance(model, os.PathLike) or _HUB_ID.fullmatch(name) is None or name.startswith("."):
        raise ModelNotFoundError(f"no such directory: {name} (and it is no Hub id, which reads owner/name)")
    path = _download(name, revision, config_only=config_only)
    return _read_directory(name, path, path / "config.json")


def dtype_name(config: Mapping[str, Any], dtype: str = "auto") -> str:
    """The dtype to compute in; "auto" is the configuration's own, bfloat16 where it names none.

    Raises ConfigError where config.json, or `dtype`, names something that weights are not kept in.
    """
    if dtype == "auto":  # transformers 5 writes `dtype`, older versions and the Hub `torch_dtype`
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ConfigError(f"dtype must be one of auto, {', '.join(_DTYPES)}, got {dtype!r}")
    return name


def read_json_object(file: Path) -> dict[str, Any]:
    """Parse a JSON file whose top level must be an object; ConfigError names file, line and column."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{file}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); repair the file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start}: {error.reason})") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds a JSON {_json_kind(value)}; it must hold an object")
    return value


def _read_directory(name: str, directory: Path, config_file: Path) -> ModelFiles:
    if not config_file.is_file():
        raise ModelNotFoundError(
            f"{directory} has no config.json, so it is no model directory; it holds {_listing(directory)}"
        )
    config = read_json_object(config_file)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        seen = f"is {architectures!r}" if "architectures" in config else "is missing"
        raise ConfigError(
            f"{config_file}: the key 'architectures' {seen}; it must be a list with the name of the model's class, "
            f'such as ["Qwen3NextForCausalLM"]'
        )
    return ModelFiles(
        name=name,
        path=directory,
        config=config,
        generation_config=_read_optional(directory / "generation_config.json") or {},
        tokenizer_config=_read_optional(directory / "tokenizer_config.json"),
    )


def _read_optional(file: Path) -> dict[str, Any] | None:
    return read_json_object(file) if file.is_file() else None


def _download(repo_id: str, revision: str | None, *, config_only: bool) -> Path:
    """The local snapshot of a Hub repository, downloaded where it is not in the cache."""
    # Imported here because most runs read a local directory and need no HTTP client.
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    wanted = f"{repo_id!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        found = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=_SMALL_FILES if config_only else [*_SMALL_FILES, "*.safetensors"],
            # Some repositories carry the weights a second time, in their authors' own layout.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except hub.GatedRepoError as error:
        raise ModelNotFoundError(
            f"the Hub lets only approved accounts read {wanted}; ask for access on its page, then `hf auth login`"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"the Hub's {repo_id!r} has no revision {revision!r}") from error
    except hub.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"no such directory and no such model on the Hub: {wanted} (if it is private, `hf auth login` first)"
        ) from error
    except hub.HFValidationError as error:
        raise ModelNotFoundError(f"no such directory: {repo_id} (and it is no Hub id)") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise ModelNotFoundError(
            f"no such directory: {repo_id}; as a Hub id it is not in the local cache, and the Hub cannot be reached "
            f"from here"
        ) from error
    except Exception as error:  # the HTTP client's own errors are no part of huggingface_hub's interface
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelNotFoundError(f"downloading {wanted} from the Hub failed: {reason}") from error
    return Path(found)


def _no_weights_message(directory: Path) -> str:
    message = f"no safetensors weights in {directory}: neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX_FILE}; "
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        return (
            f"{message}it holds {_some(pickles)}, which must be converted first: load the model with transformers "
            f"and call save_pretrained"
        )
    shards = sorted(p.name for p in directory.glob("*.safetensors"))
    if shards:
        return (
            f"{message}it holds {_some(shards)}; add the index that belongs to them, or rename a single file"
        )
    return f"{message}it holds {_listing(directory)}; download the weights"


def _listing(directory: Path) -> str:
    return _some(sorted(p.name + "/" * p.is_dir() for p in directory.iterdir())) or "nothing"


def _some(names: Iterable[str], limit: int = 8) -> str:
    every = list(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more


def _json_kind(value: object) -> str:
    kinds = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")
