"""SequenceQueues: the sequences that wait and those that run, each in order of urgency."""

from __future__ import annotations

from bisect import bisect_left, insort

from moe_runtime.scheduler.sequence import Sequence, SequenceStatus


class SequenceQueues:
    """Who waits, who runs, and who waits for another sample of its request. Read freely, write by methods."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._samples: dict[str, list[Sequence]] = {}  # all that wait or run, by request id
        self._computing: dict[str, Sequence] = {}  # by request id, whose prompt its other samples wait for

    def samples(self, request_id: str) -> tuple[Sequence, ...]:
        """The samples of a request that wait or run, in the order in which they were added."""
        return tuple(self._samples.get(request_id, ()))

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait."""
        self._samples.setdefault(sequence.request.request_id, []).append(sequence)
        insort(self.waiting, sequence, key=_order)

    def start(self, index: int) -> None:
        """Let the waiting sequence at this place run."""
        sequence = self.waiting.pop(index)
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=_order)

    def send_back(self, sequence: Sequence) -> None:
        """Let a running sequence wait, before all that are less urgent."""
        self._take_out(sequence)
        sequence.status = SequenceStatus.WAITING
        insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""
        self._take_out(sequence)
        sequence.status = SequenceStatus.FINISHED
        request_id = sequence.request.request_id
        samples = self._samples[request_id]
        samples.remove(sequence)
        if not samples:
            del self._samples[request_id]

    def _take_out(self, sequence: Sequence) -> None:
        group = self.running if sequence.status is SequenceStatus.RUNNING else self.waiting
        index = bisect_left(group, sequence.order, key=_order)
        assert group[index] is sequence, "a sequence is not where its status says"
        del group[index]
        self.end_hold(sequence)

    # ----------------------------------------------------------------- samples of one request

    def hold_others(self, sequence: Sequence) -> None:
        """Let the other samples of its request wait until `end_hold`, or until it no longer runs."""
        self._computing[sequence.request.request_id] = sequence

    def end_hold(self, sequence: Sequence) -> None:
        """Let the other samples go on, if they wait for this one."""
        request_id = sequence.request.request_id
        if self._computing.get(request_id) is sequence:
            del self._computing[request_id]

    def is_held(self, sequence: Sequence) -> bool:
        """Whether it waits for another sample of its request, whose prompt it will find cached."""
        first = self._computing.get(sequence.request.request_id)
        return first is not None and first is not sequence


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
