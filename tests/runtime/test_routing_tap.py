"""RoutingTap: nothing between the dispatcher and the model while it is off, exact choices while it is on."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from moe_models.interfaces import ExpertShard
from moe_models.local_dispatch import LocalDispatcher
from moe_runtime.experts.routing_tap import RoutingTap
from moe_runtime.parallel.dispatch import ExpertLoad
from moe_runtime.probe import RankProbe
from moe_runtime.timing.events import HostEvent
from moe_runtime.timing.timer import PartTimer

CPU = torch.device("cpu")
NUM_EXPERTS, TOP_K, LAYERS, HIDDEN = 6, 2, 2, 3
INNER = LocalDispatcher(ExpertShard.whole(NUM_EXPERTS))


def _tap() -> RoutingTap:
    return RoutingTap(LAYERS, TOP_K, CPU)


def _step(tap: RoutingTap, num_tokens: int, load: ExpertLoad | None = None) -> list[torch.Tensor]:
    """A step through all layers, in which routers choose experts 0 and 1; the weights that each layer gave."""
    dispatcher = tap.watch(load.watch(INNER) if load else INNER)
    ids_TK = torch.tensor([[0, 1]]).expand(num_tokens, TOP_K)
    weights_TK = torch.tensor([[0.75, 0.25]]).expand(num_tokens, TOP_K)
    x_TH = torch.zeros(num_tokens, HIDDEN)
    return [dispatcher.dispatch(x_TH, ids_TK, weights_TK).weights_GK for _ in range(LAYERS)]


def _trace(num_tokens: int) -> list[np.ndarray]:
    """Token t chooses t and t + 1 in the first layer, t + 2 and t + 3 in the second."""
    first = np.arange(num_tokens)[:, None] + np.arange(TOP_K)
    return [((first + 2 * layer) % NUM_EXPERTS).astype(np.int16) for layer in range(LAYERS)]


def test_a_tap_that_is_off_is_not_there() -> None:
    tap = _tap()
    assert tap.watch(INNER) is INNER
    tap.record(True)
    assert tap.watch(INNER) is not INNER
    tap.record(False)
    assert tap.watch(INNER) is INNER


def test_choices_are_taken_in_order_and_once() -> None:
    tap = _tap()
    tap.record(True)
    for num_tokens in (2, 0, 1):
        _step(tap, num_tokens)
    taken = tap.take()
    assert [layer.tolist() for layer in taken] == [[[0, 1]] * 3] * LAYERS
    assert {layer.dtype for layer in taken} == {np.dtype(np.int16)}
    assert [layer.shape for layer in tap.take()] == [(0, TOP_K)] * LAYERS


def test_forced_choices_come_in_turn_start_again_at_the_end_and_have_equal_weights() -> None:
    tap, trace = _tap(), _trace(5)
    tap.replay(trace, first=3)
    tap.record(True)
    weights = [layer for num_tokens in (1, 0, 3, 9) for layer in _step(tap, num_tokens)]
    rows = np.arange(3, 3 + 13) % 5
    for layer, of_trace in zip(tap.take(), trace, strict=True):
        assert layer.tolist() == of_trace[rows].tolist()
    assert all((of_layer == 0.5).all() for of_layer in weights)
    tap.replay(None)
    _step(tap, 1)
    assert tap.take()[0].tolist() == [[0, 1]]


def test_a_trace_that_is_replayed_once_gives_its_own_loads() -> None:
    tap, trace = _tap(), _trace(11)
    load = ExpertLoad(LAYERS, NUM_EXPERTS, CPU)
    tap.replay(trace, first=4)
    for num_tokens in (4, 1, 6):
        _step(tap, num_tokens, load)
    expected = [np.bincount(of_layer.reshape(-1), minlength=NUM_EXPERTS).tolist() for of_layer in trace]
    assert load.tokens_per_expert().tolist() == expected


def test_a_probe_works_in_the_loops_thread_and_ranks_begin_at_their_own_rows() -> None:
    threads = []

    def call(function: Callable[[], None]) -> None:
        thread = threading.Thread(target=function)
        threads.append(thread)
        thread.start()

    taps = [_tap(), _tap()]
    timer = PartTimer(16, HostEvent)
    probes = [RankProbe(call, timer, tap, rank=rank, num_ranks=2) for rank, tap in enumerate(taps)]
    for probe in probes:
        probe.record_choices(True)
        probe.replay_choices(_trace(6))
    for tap in taps:
        _step(tap, 1)
    assert [probe.take_choices()[0].tolist() for probe in probes] == [[[0, 1]], [[3, 4]]]
    probes[0].record_choices(False)
    with pytest.raises(AssertionError, match="nothing is recorded"):  # the caller's error, not the loop's
        probes[0].take_choices()
    probes[0].settle()
    assert len(threads) == 9
