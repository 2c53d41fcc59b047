"""The output of a batch: one answer a line, in any order, added to what an earlier run has written."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from moe_runtime.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of one request."""

    status: int | None  # of HTTP; None: there was no answer
    request_id: str = ""  # that the server gave it
    body: dict[str, Any] | None = None
    error: str | None = None  # why there was no answer

    @property
    def ok(self) -> bool:
        """Whether the request was answered, and with no error."""
        return self.status is not None and self.status < 400

    def line(self, custom_id: str) -> bytes:
        """The answer as a line of the output."""
        response = {"status_code": self.status, "request_id": self.request_id, "body": self.body}
        value = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": custom_id,
            "response": None if self.status is None else response,
            "error": None if self.error is None else {"code": "internal_error", "message": self.error},
        }
        return json.dumps(value).encode() + b"\n"


class AnswerFile:
    """An output file, held by one run at a time.

    What an earlier run has answered stays. Its errors go, so that they are tried again, and so does a line that it
    could not finish. Answers are written whole: a run that is killed leaves at most its last line torn.
    """

    def __init__(self, path: Path, custom_ids: Collection[str]) -> None:
        """
        Args:
            custom_ids: of the input's requests.

        Raises:
            ConfigError: another run writes the file, it cannot be written, or it holds answers to other requests.
        """
        self._path = path
        self._custom_ids = custom_ids
        self.answered: set[str] = set()  # ids of requests that need no answer any more
        self._file = _open_locked(path)
        try:
            if not self._survey():
                self._drop_the_rest()
        except BaseException:
            self._file.close()
            raise

    def write(self, custom_id: str, answer: Answer) -> None:
        """Add an answer."""
        line = answer.line(custom_id)
        while line:
            line = line[os.write(self._file.fileno(), line) :]
        if answer.ok:
            self.answered.add(custom_id)

    def close(self) -> None:
        """Give the file up, with all that was written safe on the disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _survey(self) -> bool:
        """Find out what is answered; returns whether every line is a good one."""
        all_good = True
        self._file.seek(0)
        for line in self._file:
            custom_id = _answered_id(line)
            all_good &= custom_id is not None and custom_id not in self.answered and line.endswith(b"\n")
            if custom_id is None:
                continue
            if custom_id not in self._custom_ids:
                raise ConfigError(
                    f"{self._path} answers {custom_id!r:.50}, which the input does not ask: it belongs to another "
                    "batch; give another -o, or remove it"
                )
            self.answered.add(custom_id)
        return all_good

    def _drop_the_rest(self) -> None:
        """Put a file with the good lines only in this one's place, at once."""
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        new = _open_locked(draft)
        try:
            for line in self._good_lines():
                new.write(line)
            new.flush()
            os.fsync(new.fileno())
            os.replace(draft, self._path)
        except BaseException:
            new.close()
            draft.unlink(missing_ok=True)
            raise
        self._file.close()
        self._file = new

    def _good_lines(self) -> Iterator[bytes]:
        seen: set[str] = set()
        self._file.seek(0)
        for line in self._file:
            custom_id = _answered_id(line)
            if custom_id is not None and custom_id not in seen:
                seen.add(custom_id)
                yield line.rstrip(b"\n") + b"\n"


def _open_locked(path: Path) -> BinaryIO:
    """Open for reading and appending, made where there is none."""
    try:
        file = path.open("a+b")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"another run writes {path}; wait for it, or give another -o") from None
    except OSError:
        pass  # a file system without locks
    return file


def _answered_id(line: bytes) -> str | None:
    """The id of the request that a line answers; None if it does not, or holds an error, or is torn."""
    try:
        value = json.loads(line)
        custom_id, status = value["custom_id"], value["response"]["status_code"]
        good = isinstance(custom_id, str) and status < 400 and value.get("error") is None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return custom_id if good else None
