"""Stop strings: find them as text grows, and hold back text that may be the start of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Ends a text at the first stop string to be complete in it, however the text is split into deltas.

    Of two that end at the same character the longer counts. Each stop string is followed by an automaton
    (Knuth, Morris, Pratt 1977), so the cost is linear in the text.
    """

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        """`stop` must hold no empty string; it may be empty, and then text passes through at once."""
        assert all(stop), "an empty stop string"
        self._stop = tuple(stop)
        self._include = include_stop_str_in_output
        self._failure = tuple(_failure_table(text) for text in self._stop)
        self._matched = [0] * len(self._stop)  # characters of each that the text so far ends with
        self._held = ""
        self.stopped_by: str | None = None  # the stop string that was found

    def append(self, delta: str, check: bool = True) -> str:
        """Take more text; what may be shown now. After a stop it is always "".

        With `check` False (the first min_tokens tokens) a stop string that ends in `delta` does not count.
        """
        if self.stopped_by is not None:
            return ""
        if not self._stop:
            return delta
        text = self._held + delta
        for position in range(len(self._held), len(text)):
            found = self._advance(text[position])
            if found is not None and check:
                self.stopped_by = found
                self._held = ""
                end = position + 1
                return text[: end if self._include else end - len(found)]
        keep = len(text) - max(self._matched)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back, when the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        """Feed one character to every automaton; the longest stop string that it completes."""
        found: str | None = None
        for i, stop in enumerate(self._stop):
            failure, matched = self._failure[i], self._matched[i]
            while matched and stop[matched] != char:
                matched = failure[matched - 1]
            if stop[matched] == char:
                matched += 1
            if matched == len(stop):
                if found is None or len(stop) > len(found):
                    found = stop
                matched = failure[matched - 1]
            self._matched[i] = matched
        return found


def _failure_table(text: str) -> list[int]:
    """For each prefix of `text`, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[length] != text[i]:
            length = table[length - 1]
        if text[length] == text[i]:
            length += 1
        table[i] = length
    return table
