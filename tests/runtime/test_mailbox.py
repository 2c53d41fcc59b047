"""Parking of ranks: no wake-up is lost, and none is one-sided, in whatever order things happen."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable

import pytest

from moe_runtime.request import EngineRequest, SamplingParams
from moe_runtime.transport.mailbox import Mailbox

GENERATION = 4


def _request(number: int) -> EngineRequest:
    return EngineRequest(
        request_id=str(number), sample_index=0, prompt_token_ids=(1,), params=SamplingParams(), seed=0
    )


def _parks(mailbox: Mailbox, step: int, has_work: bool = False) -> tuple[threading.Thread, list[int]]:
    """Park in a thread of its own; the list gets the numbers that it woke its peers with."""
    woke: list[int] = []
    thread = threading.Thread(target=mailbox.park, args=(step, has_work, woke.append), daemon=True)
    thread.start()
    return thread, woke


def _is_parked(thread: threading.Thread) -> bool:
    thread.join(0.05)
    return thread.is_alive()


def _ended(thread: threading.Thread) -> bool:
    thread.join(5)
    return not thread.is_alive()


def test_mail_that_came_before_parking_is_not_lost() -> None:
    mailbox = Mailbox(GENERATION)
    mailbox.submit("driver", [_request(1)])
    thread, woke = _parks(mailbox, 3)
    assert _ended(thread)
    assert woke == [3]


def test_mail_that_comes_while_parked_wakes_this_rank_and_its_peers() -> None:
    mailbox = Mailbox(GENERATION)
    thread, woke = _parks(mailbox, 3)
    assert _is_parked(thread)
    mailbox.submit("driver", [_request(1)])
    assert _ended(thread)
    assert woke == [3]


def _settles(mailbox: Mailbox, quiet_s: float, most_s: float) -> threading.Thread:
    thread = threading.Thread(target=mailbox.settle, args=(quiet_s, most_s), daemon=True)
    thread.start()
    return thread


def test_settling_lasts_until_no_request_has_come_for_a_while() -> None:
    mailbox = Mailbox(GENERATION)
    thread = _settles(mailbox, 0.5, 60)
    for number in range(8):
        time.sleep(0.1)
        mailbox.submit("driver", [_request(number)])
    assert thread.is_alive()
    assert _ended(thread)
    assert len(mailbox.take().submitted) == 8


def test_settling_does_not_wait_for_a_burst_without_end() -> None:
    mailbox = Mailbox(GENERATION)
    thread = _settles(mailbox, 0.05, 0.2)
    deadline = time.monotonic() + 5
    while thread.is_alive() and time.monotonic() < deadline:
        mailbox.submit("driver", [_request(0)])
        time.sleep(0.001)
    assert not thread.is_alive()


def test_settling_ends_when_the_rank_is_told_to_stop() -> None:
    mailbox = Mailbox(GENERATION)
    thread = _settles(mailbox, 60, 60)
    assert _is_parked(thread)
    mailbox.stop()
    assert _ended(thread)


def test_a_peers_wake_up_that_comes_before_parking_is_not_lost_and_not_passed_on() -> None:
    mailbox = Mailbox(GENERATION)
    mailbox.wake(GENERATION, 3)
    thread, woke = _parks(mailbox, 3)
    assert _ended(thread)
    assert woke == []


@pytest.mark.parametrize(("generation", "step"), [(GENERATION, 2), (GENERATION - 1, 3), (GENERATION - 1, 9)])
def test_wake_ups_of_earlier_parkings_and_generations_are_ignored(generation: int, step: int) -> None:
    mailbox = Mailbox(GENERATION)
    mailbox.wake(generation, step)
    thread, _ = _parks(mailbox, 3)
    assert _is_parked(thread)
    mailbox.wake(generation, step)
    assert _is_parked(thread)
    mailbox.wake(GENERATION, 3)
    assert _ended(thread)


def test_a_paused_rank_stays_parked_with_work_and_mail_until_it_is_resumed() -> None:
    mailbox = Mailbox(GENERATION)
    mailbox.pause(True)
    mailbox.submit("driver", [_request(1)])
    thread, woke = _parks(mailbox, 1, has_work=True)
    assert _is_parked(thread)
    mailbox.pause(False)
    assert _ended(thread)
    assert woke == [1]


def test_stop_ends_parking_even_while_paused() -> None:
    mailbox = Mailbox(GENERATION)
    mailbox.pause(True)
    thread, woke = _parks(mailbox, 1)
    assert _is_parked(thread)
    mailbox.stop()
    assert _ended(thread)
    assert woke == [1]


def test_a_parked_rank_takes_no_cpu() -> None:
    mailbox = Mailbox(GENERATION)
    thread, _ = _parks(mailbox, 1)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05
    mailbox.stop()
    assert _ended(thread)


class _Ranks:
    """The step loops of several ranks without models: mail in, agreements, parking.

    `pause_at(rank, point)` is called between any two of their actions, to force an interleaving.
    """

    def __init__(self, size: int, pause_at: Callable[[int, str], None]) -> None:
        self.mailboxes = [Mailbox(GENERATION) for _ in range(size)]
        self.done: list[str] = []
        self._pause_at = pause_at
        self._size = size
        self._values: list[list[int]] = [[] for _ in range(size)]
        self._barrier = threading.Barrier(size)
        self.parkings = [0] * size
        self.threads = [threading.Thread(target=self._loop, args=(r,), daemon=True) for r in range(size)]

    def _agree(self, rank: int, values: list[int]) -> list[list[int]]:
        self._values[rank] = values
        self._barrier.wait(10)  # a rank that never comes breaks the barrier, which fails the test
        agreed = list(self._values)
        self._barrier.wait(10)
        return agreed

    def _loop(self, rank: int) -> None:
        mailbox, backlog = self.mailboxes[rank], 0
        for agreement in itertools.count(1):
            self._pause_at(rank, "before mail")
            mail = mailbox.take()
            backlog += len(mail.submitted)
            self._pause_at(rank, "before agreement")
            agreed = self._agree(rank, [backlog > 0, mailbox.stopping])
            self._pause_at(rank, "after agreement")
            if any(stopping for _, stopping in agreed):
                return
            if any(work for work, _ in agreed):
                if backlog:
                    backlog -= 1
                    self.done.append(f"{rank}")
            else:
                self.parkings[rank] += 1
                mailbox.park(agreement, backlog > 0, lambda step: self._wake(rank, step))

    def _wake(self, rank: int, step: int) -> None:
        self._pause_at(rank, "before wake")
        for peer, mailbox in enumerate(self.mailboxes):
            if peer != rank:
                mailbox.wake(GENERATION, step)
                self._pause_at(rank, "between wakes")


def _finish(ranks: _Ranks, expected: int) -> None:
    deadline = time.monotonic() + 20
    while len(ranks.done) < expected:
        assert time.monotonic() < deadline, (
            f"{len(ranks.done)} of {expected} requests done: a wake-up was lost"
        )
        assert all(thread.is_alive() for thread in ranks.threads), "a rank was left alone in an agreement"
        time.sleep(0.001)
    for mailbox in ranks.mailboxes:
        mailbox.stop()
    for thread in ranks.threads:
        assert _ended(thread)


@pytest.mark.parametrize(
    "point", ["before mail", "before agreement", "after agreement", "before wake", "between wakes"]
)
@pytest.mark.parametrize("slow_rank", [0, 1])
def test_work_that_arrives_at_any_point_of_any_rank_is_done(point: str, slow_rank: int) -> None:
    """One rank stands still at `point` while mail arrives at itself, at the other rank, or at both."""
    for receivers in ([0], [1], [0, 1]):
        reached, go_on = threading.Event(), threading.Event()

        def pause_at(
            rank: int, where: str, reached: threading.Event = reached, go_on: threading.Event = go_on
        ) -> None:
            if (rank, where) == (slow_rank, point) and not go_on.is_set():
                reached.set()
                assert go_on.wait(10)

        ranks = _Ranks(2, pause_at)
        for thread in ranks.threads:
            thread.start()
        if point in ("before wake", "between wakes"):
            ranks.mailboxes[slow_rank].submit("d", [_request(0)])
        assert reached.wait(10)
        for receiver in receivers:
            ranks.mailboxes[receiver].submit("d", [_request(1), _request(2)])
        time.sleep(0.01)
        go_on.set()
        _finish(ranks, 2 * len(receivers) + (point in ("before wake", "between wakes")))


@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals_at_three_ranks_are_all_done(seed: int) -> None:
    draw = random.Random(seed)

    def pause_at(rank: int, where: str) -> None:
        if draw.random() < 0.2:
            time.sleep(draw.random() * 0.002)

    ranks = _Ranks(3, pause_at)
    for thread in ranks.threads:
        thread.start()
    for number in range(150):
        ranks.mailboxes[draw.randrange(3)].submit("d", [_request(number)])
        time.sleep(draw.random() * 0.004)
    _finish(ranks, 150)
    assert min(ranks.parkings) > 10
    assert len(set(ranks.parkings)) == 1
