"""Report: what every benchmark prints. Hardware and workload, a table, and one JSON object as the last line."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from moe_runtime import __version__
from moe_runtime.bench.machine import cpu_model, last_level_cache
from moe_runtime.errors import ConfigError

_PIPE_WIDTH = 180
_GIT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTable:
    """Cells as they are printed; the first column is left-aligned, the others right-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run of one benchmark."""

    benchmark: str  # the command's name
    device: str  # what computed
    started_load: float  # load average of the last minute when the run began: above 0, others compute too
    workload: Mapping[str, Any]
    results: Sequence[Mapping[str, Any]]
    tables: Sequence[TextTable]
    texts: Sequence[str] = ()  # printed as they are, after the tables
    details: Mapping[str, Any] = field(default_factory=dict)  # further parts of the JSON object, not printed

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: everything but tables and texts, which show a part of the results."""
        return {
            "benchmark": self.benchmark,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": asdict(_hardware(self.device, self.started_load)),
            "versions": _versions(),
            "workload": dict(self.workload),
            "results": [dict(result) for result in self.results],
            **self.details,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hardware:
    """Where a run took place."""

    device: str
    cpu: str  # name, family and model: a virtual machine's name says less than these
    cores: int  # that this process may use
    memory_gib: float
    last_level_cache: str | None  # where the system says
    system: str
    load_average_before: float
    load_average_after: float  # includes what the run itself did


def load_average() -> float:
    """Of the last minute: processes that ran or wanted to."""
    return round(os.getloadavg()[0], 2)


def check_writable(file: str | None, flag: str = "--save-result") -> None:
    """Refuse a file that cannot be written, before minutes are spent on what goes into it.

    Raises:
        ConfigError: its directory does not exist, or it is one itself.
    """
    if file is not None and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise ConfigError(f"{flag} {file}: give a file in a directory that exists")


def publish(report: Report, save_result: str | None, *, json_alone: bool = False) -> None:
    """Print a report; its JSON object is the last line of stdout and, if asked for, the content of a file.

    Args:
        json_alone: print nothing else.
    """
    as_dict = report.to_dict()
    if not json_alone:
        _print_for_people(report, as_dict)
    line = json.dumps(as_dict)
    if save_result is not None:
        Path(save_result).write_text(line + "\n")
    print(line, flush=True)


def _print_for_people(report: Report, as_dict: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
    for name in ("hardware", "versions", "workload"):
        facts = ", ".join(f"{key} {value}" for key, value in as_dict[name].items())
        console.print(f"{name}: {facts}", markup=False)
    for table in report.tables:
        shown = Table(title=table.title, title_justify="left")
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if index else "left", no_wrap=not index)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for text in report.texts:
        print(text)


def _hardware(device: str, started_load: float) -> _Hardware:
    return _Hardware(
        device=device,
        cpu=cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        last_level_cache=last_level_cache(),
        system=f"{platform.system()} {platform.machine()}",
        load_average_before=started_load,
        load_average_after=load_average(),
    )


def _versions() -> dict[str, str | None]:
    found = {
        "moe_runtime": __version__,
        "commit": _commit(Path(__file__)),
        "python": platform.python_version(),
    }
    for name in ("torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit(file: Path) -> str | None:
    """Short hash of the checkout that has `file`, with "+changes" if a tracked file differs; None outside one."""
    # An installed file may lie in somebody's repository, in a virtual environment, and is then not one of its files.
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    # Of no tag, so that it is the hash in any clone.
    return _git(file.parent, "describe", "--always", "--exclude=*", "--dirty=+changes")


def _git(directory: Path, *arguments: str) -> str | None:
    """What git prints; None if it is not installed, refuses, or does not answer."""
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
