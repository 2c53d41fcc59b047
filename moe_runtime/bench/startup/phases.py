"""The phases of a start, and how long each took: from its beginning to that of the one that came next."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

# In the order in which they come; not every start has all of them.
PHASES: Mapping[str, str] = {
    "imports": "interpreter and imports",
    "checkpoint": "reading config.json and the headers of the weights",
    "ray": "starting Ray, or connecting to it",
    "inspection": "inspecting the model class",
    "placement": "reserving the ranks' resources",
    "attach": "finding the deployment",
    "actors": "starting the ranks' processes, their imports",
    "join": "process groups between the ranks",
    "load": "building the model, reading the weights",
    "caches": "making the caches of keys, values and states",
    "compile": "compiling kernels, by running each once",
    "dispatchers": "scheduler, tokenizer and dispatchers of each rank",
    "connect": "tokenizer, sockets to the ranks",
    "first token": "prefill of a short prompt",
}
END = "end"  # the first token is there


def split_phases(began: Mapping[str, float], spawned: float) -> dict[str, float]:
    """Seconds of each phase, by name and in order; they add up to the whole.

    Args:
        began: clock at which each phase began, and END.
        spawned: clock at which the process was started: what is before the first phase is "imports".
    """
    marks = sorted({**began, "imports": spawned}.items(), key=lambda mark: mark[1])
    return {name: later - time for (name, time), (_, later) in pairwise(marks) if name != END}
