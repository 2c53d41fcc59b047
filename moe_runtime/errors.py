"""Every error that a user can meet. Each message says what was wrong, the value seen, the value wanted, the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class MoeRuntimeError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line and exits with `exit_status`.

    Subclasses whose constructor takes more than the message must pass every argument on to
    `super().__init__`, so that they survive pickling between processes.
    """

    exit_status = 1


class UserError(MoeRuntimeError, ValueError):
    """Bad input: a flag, an argument, a file or a prompt that cannot be accepted."""

    exit_status = 2


class ConfigError(UserError):
    """An argument, flag or configuration key has a value that cannot be used."""


class ModelNotFoundError(UserError):
    """The model's directory, or a file that it must hold, is missing."""


class CheckpointError(UserError):
    """The checkpoint's files are broken, or its tensors are not the model's."""


class UnknownArchitectureError(UserError):
    """No registered model has this architecture's name."""


class PromptError(UserError):
    """A prompt cannot be served: empty, too long, or with token ids outside the vocabulary."""


class PlacementError(UserError):
    """The cluster has not the resources that the deployment asks for."""


class RayStartError(MoeRuntimeError):
    """A Ray of this process' own did not start, or the cluster's did not let it in."""


class InspectionError(MoeRuntimeError):
    """A model class could not be inspected."""


class ModelImportError(InspectionError):
    """Importing the model's module failed."""


class AcceleratorTouchError(InspectionError):
    """Importing or building the model touched an accelerator."""


class InspectionTimeoutError(InspectionError):
    """The inspection did not end in time and was killed."""


class InspectionCrashError(InspectionError):
    """The inspecting process died of a signal or left without a result."""


class QueueFullError(MoeRuntimeError):
    """Too many requests wait; this one was refused and may be sent again later."""


class RankFailedError(MoeRuntimeError):
    """A rank raised an exception, died or stopped answering; every request in flight ended with it."""


class PeerLostError(MoeRuntimeError):
    """A collective failed on a rank because another rank died, raised, or stopped answering."""


class BenchmarkPeerError(MoeRuntimeError):
    """Another engine, which a benchmark compares with, could not be started, failed or gave no answer."""


class ChannelError(MoeRuntimeError):
    """A driver and a rank cannot talk: nobody listens, or one of them does not know the deployment's key."""


class ServerError(MoeRuntimeError):
    """An HTTP server that we are a client of cannot be reached, or refuses what it was asked."""


class EngineDeadError(MoeRuntimeError):
    """The deployment has ended (a rank failed, or it was shut down) and takes no more requests."""


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Up to `count` of the `known` names that look most like `name`, best first."""
    by_lower = {k.lower(): k for k in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.5)
    return [by_lower[m] for m in matches]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or an empty string."""
    found = nearest(name, known, count=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def refuse_unknown(given: Mapping[str, object], known: Iterable[str], what: str) -> None:
    """Raise ConfigError for the first key of `given` that is not in `known`, naming its nearest match."""
    names = list(known)
    for key in given:
        if key not in names:
            raise ConfigError(
                f"{what} has no argument {key!r}{did_you_mean(key, names) or f'; it has {names}'}"
            )
