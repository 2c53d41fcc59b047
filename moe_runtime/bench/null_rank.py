"""A rank with everything but a model, in a process of its own: what `bench overhead` measures."""

from __future__ import annotations

import os
import secrets
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import cast

import torch

from moe_kernels.device import DeviceProfile
from moe_models.interfaces import CausalLM, TokenDispatcher
from moe_runtime.bench.null_model import NullModel
from moe_runtime.bench.step_clock import Moment, StepClock, now
from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.cache.slots import SlotAllocator
from moe_runtime.delivery import Delivery
from moe_runtime.modelfiles import resolve_model
from moe_runtime.parallel.groups import ProcessGroups, connect_store, host_store
from moe_runtime.runner import Runner, StepResult
from moe_runtime.scheduler import ScheduledStep, Scheduler, SchedulerConfig
from moe_runtime.step_loop import StepLoop
from moe_runtime.timing.timer import PartTimer
from moe_runtime.tokenizer import load_tokenizer
from moe_runtime.transport.mailbox import Mailbox
from moe_runtime.transport.rank_server import RankServer

LOOPBACK = "127.0.0.1"
SLACK_STEPS = 64  # that a case's requests go on for after what is measured
BLOCK_SIZE = 16
_MAX_BATCHED_TOKENS = 2048
_GLOO_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OverheadCase:
    """One measurement."""

    num_seqs: int  # that run at once
    vocab_size: int
    sampling: str  # "greedy" or "top-p"
    num_steps: int  # to measure
    num_warmup_steps: int  # before that, with all sequences running
    prompt_len: int
    threads: int  # of torch in the rank

    @property
    def max_tokens(self) -> int:
        """Tokens of a request: enough for all sequences to run together until the measurement is over."""
        prefill_steps = -(-self.num_seqs * self.prompt_len // (_MAX_BATCHED_TOKENS - self.num_seqs))
        return 2 * prefill_steps + self.num_warmup_steps + self.num_steps + SLACK_STEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMeasurement:
    """What the rank's process sends back."""

    device: str
    wall_us: dict[str, float]  # median microseconds a step, by part
    cpu_us: dict[str, float]  # the same of the CPU time of the loop's thread
    cpu_share: dict[str, float]  # of the rank's threads, by name


def serve_null_rank(parent: Connection, case: OverheadCase) -> None:
    """Entry of the process. Sends address and key; "enough" when all steps are measured; after it is told to
    stop a RankMeasurement.
    """
    torch.set_num_threads(case.threads)
    key = secrets.token_bytes(32)
    mailbox = Mailbox(0)
    server = RankServer(LOOPBACK, key, mailbox)
    clock = StepClock(case.num_warmup_steps, case.num_steps, on_enough=lambda: parent.send("enough"))
    loop = _make_loop(case, mailbox, server, clock)
    parent.send((server.address, key))

    def stop_when_told() -> None:
        try:
            parent.recv()
        except EOFError:  # it has gone, and nobody wants to hear of it
            os._exit(1)
        mailbox.stop()

    threading.Thread(target=stop_when_told, name="stop", daemon=True).start()
    loop.run()
    server.close()
    parent.send(
        RankMeasurement(
            device=str(DeviceProfile.query("cpu")),
            wall_us=clock.wall_us(),
            cpu_us=clock.cpu_us(),
            cpu_share=clock.cpu_share,
        )
    )


def _make_loop(case: OverheadCase, mailbox: Mailbox, server: RankServer, clock: StepClock) -> StepLoop:
    tokenizer = load_tokenizer(resolve_model(None))
    max_model_len = case.prompt_len + case.max_tokens
    num_blocks = 1 + case.num_seqs * -(-max_model_len // BLOCK_SIZE)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=case.num_seqs,
            max_num_batched_tokens=max(_MAX_BATCHED_TOKENS, case.num_seqs),
            block_size=BLOCK_SIZE,
            max_model_len=max_model_len,
        ),
        BlockAllocator(num_blocks, BLOCK_SIZE),
        SlotAllocator(1 + case.num_seqs),
    )
    delivery = Delivery(tokenizer)
    for owner, method, part in (
        (scheduler, "schedule", "scheduling"),
        (scheduler, "update", "scheduling"),
        (delivery, "take", "detokenising"),
        (delivery, "drain", "delivery"),
        (server, "deliver", "delivery"),
        (mailbox, "take", "mail"),
    ):
        clock.time(owner, method, part)
    model = NullModel(case.num_seqs, case.vocab_size, tokenizer.vocab_size)

    def agree(values: list[int]) -> list[list[int]]:
        clock.next_step()
        return [values]

    return StepLoop(
        scheduler=scheduler,
        runner=_TimedRunner(model, case, clock),
        delivery=delivery,
        mailbox=mailbox,
        server=server,
        agree=agree,
        dispatcher_for_step=lambda counts: cast(TokenDispatcher, None),
        timer=PartTimer.on_host(),
        generation=0,
    )


class _TimedRunner:
    """The Runner itself; its time before the model's forward is batch building, the time after it sampling."""

    def __init__(self, model: NullModel, case: OverheadCase, clock: StepClock) -> None:
        self._model = model
        self._case = case
        self._clock = clock
        self._runner = Runner(cast(CausalLM, model), (), block_size=BLOCK_SIZE, vocab_size=case.vocab_size)
        self._began: Moment = (0.0, 0.0)
        model.register_forward_pre_hook(lambda *_: self._next_part("batch building"))

    def run(self, step: ScheduledStep, dispatcher: TokenDispatcher) -> StepResult:
        self._began = now()
        result = self._runner.run(step, dispatcher)
        self._next_part("sampling")
        batch = self._model.batch
        if batch is not None and batch.num_decodes == batch.num_seqs == self._case.num_seqs:
            self._clock.count()
        return result

    def _next_part(self, part: str) -> None:
        self._clock.add(part, self._began)
        self._began = now()


def agree_over_gloo(parent: Connection, rank: int, num_ranks: int, num_rounds: int) -> None:
    """Entry of a process of two or more that agree with one another and do nothing else.

    Rank 0 sends the store's address first, the others receive it; each sends its median microseconds.
    """
    torch.set_num_threads(1)
    if rank == 0:
        store, address = host_store(LOOPBACK, num_ranks, _GLOO_TIMEOUT_S)
        parent.send(address)
    else:
        store = connect_store(parent.recv(), num_ranks, _GLOO_TIMEOUT_S)
    groups = ProcessGroups.join(store, rank, num_ranks, LOOPBACK, torch.device("cpu"), _GLOO_TIMEOUT_S)
    seconds = []
    for _ in range(num_rounds):
        began = time.perf_counter()
        groups.agree([1, 1, 0])
        seconds.append(time.perf_counter() - began)
    parent.send(1e6 * median(seconds))
    groups.leave()
