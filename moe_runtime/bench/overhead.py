"""`bench overhead`: what the engine itself costs a step, with a model that computes nothing.

One rank in a process of its own, one driver in this one, connected as in a deployment but without Ray. The rank
runs scheduler, batch building, sampling, detokenising and delivery for real; the driver decodes what arrives and
keeps its ledger, as LLM does.
"""

from __future__ import annotations

import multiprocessing as mp
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from moe_runtime.bench.null_rank import (
    BLOCK_SIZE,
    SLACK_STEPS,
    OverheadCase,
    RankMeasurement,
    agree_over_gloo,
    serve_null_rank,
)
from moe_runtime.bench.plots import new_figure, save_figure
from moe_runtime.bench.report import Report, TextTable, load_average
from moe_runtime.bench.step_clock import now
from moe_runtime.client import EngineClient
from moe_runtime.errors import ConfigError, EngineDeadError, MoeRuntimeError
from moe_runtime.outputs import Ledger
from moe_runtime.request import EngineRequest, OutputDelta, SamplingParams

# Of the rank's loop, in the order in which they come.
RANK_PARTS = ("mail", "scheduling", "batch building", "sampling", "detokenising", "delivery", "other")
_SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-p": {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
}
# Above this a step takes seconds where tokens are drawn, and is measured apart.
_LARGE_VOCABULARY = 100_000
_PROMPT_TOKENS = 64  # how many different ids the random prompts have
_START_TIMEOUT_S = 120.0
_GLOO_ROUNDS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class OverheadWorkload:
    """What `bench overhead` measures: each number of sequences with each vocabulary."""

    num_seqs: tuple[int, ...] = (1, 32, 256)
    vocab_sizes: tuple[int, ...] = (1024, 151_936)
    num_steps: int = 300  # measured; a twentieth of that where sampling takes long
    prompt_len: int = 128
    threads: int = 1  # of torch in the rank

    def __post_init__(self) -> None:
        for name in ("num_seqs", "vocab_sizes"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ConfigError(f"{name} must be whole numbers of at least 1, got {list(values)}")
        for name in ("num_steps", "prompt_len", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.vocab_sizes) < _PROMPT_TOKENS:
            raise ConfigError(f"vocab_sizes must be at least {_PROMPT_TOKENS}, got {min(self.vocab_sizes)}")

    def cases(self) -> list[OverheadCase]:
        """Greedy everywhere; with a large vocabulary also drawing from what top-k and top-p leave."""
        return [
            self._case(num_seqs, vocab_size, sampling)
            for vocab_size in self.vocab_sizes
            for sampling in (("greedy", "top-p") if vocab_size >= _LARGE_VOCABULARY else ("greedy",))
            for num_seqs in self.num_seqs
        ]

    def _case(self, num_seqs: int, vocab_size: int, sampling: str) -> OverheadCase:
        # Where a step may take seconds: few steps, and prompts so short that few more are needed to start.
        is_slow = vocab_size >= _LARGE_VOCABULARY
        return OverheadCase(
            num_seqs=num_seqs,
            vocab_size=vocab_size,
            sampling=sampling,
            num_steps=-(-self.num_steps // 20) if is_slow else self.num_steps,
            num_warmup_steps=2 if is_slow else 10,
            prompt_len=min(self.prompt_len, 4) if is_slow else self.prompt_len,
            threads=self.threads,
        )


def run_overhead(workload: OverheadWorkload) -> Report:
    """Measure every case, one after the other.

    Raises:
        EngineDeadError: a rank's process ended before its time.
    """
    started_load = load_average()
    gloo_us = measure_gloo_agreement()
    measured = [measure_case(case) for case in workload.cases()]
    results = [result for _, result in measured]
    return Report(
        benchmark="overhead",
        device=measured[0][0],
        started_load=started_load,
        workload={**asdict(workload), "agreement_2_ranks_gloo_us": round(gloo_us, 1)},
        results=results,
        tables=[_table(results, gloo_us)],
    )


def measure_gloo_agreement(num_ranks: int = 2, num_rounds: int = _GLOO_ROUNDS) -> float:
    """Median microseconds of the agreement before a step, between ranks that do nothing else."""
    pipes = [_start(agree_over_gloo, rank, num_ranks, num_rounds) for rank in range(num_ranks)]
    address = _receive(pipes[0])
    for pipe in pipes[1:]:
        pipe.send(address)
    return max(_receive(pipe) for pipe in pipes)


def measure_case(case: OverheadCase) -> tuple[str, dict[str, Any]]:
    """Name of the device, and the numbers of one case."""
    pipe = _start(serve_null_rank, case)
    address, key = _receive(pipe)
    with closing(_TimedClient([address], key, BLOCK_SIZE)) as client:
        driver = _Driver(client, case)
        driver.run(until=lambda: pipe.poll())
        _receive(pipe)  # "enough"
        pipe.send("stop")
        rank: RankMeasurement = _receive(pipe)
    return rank.device, {
        "num_seqs": case.num_seqs,
        "vocab_size": case.vocab_size,
        "sampling": case.sampling,
        "num_steps": case.num_steps,
        "step_us": round(rank.wall_us["step"], 1),
        "parts_us": {part: round(rank.wall_us[part], 1) for part in RANK_PARTS},
        "step_cpu_us": round(rank.cpu_us["step"], 1),
        "parts_cpu_us": {part: round(rank.cpu_us[part], 1) for part in RANK_PARTS},
        "cpu_share": {name: round(share, 4) for name, share in sorted(rank.cpu_share.items())},
        **driver.result(),
    }


def _start(entry: Callable[..., None], *args: Any) -> Connection:
    """A process that runs `entry(connection, *args)`; it ends with this one at the latest."""
    ours, theirs = mp.Pipe()
    context = mp.get_context("spawn")
    process = context.Process(target=entry, args=(theirs, *args), daemon=True)
    # Ctrl-C comes to all processes of a terminal; this one is ended by its parent.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, interrupt)
    theirs.close()
    return ours


def _receive(pipe: Connection) -> Any:
    try:
        if pipe.poll(_START_TIMEOUT_S):
            return pipe.recv()
    except (EOFError, OSError):
        raise EngineDeadError("a process of the benchmark ended; its traceback is above") from None
    raise EngineDeadError(f"a process of the benchmark said nothing for {_START_TIMEOUT_S:.0f} s")


class _TimedClient(EngineClient):
    """Notes when a message came, and how long decoding it and handing it out took."""

    def __init__(self, addresses: Sequence[tuple[str, int]], key: bytes, block_size: int) -> None:
        self.messages: list[tuple[float, float]] = []  # (arrival, CPU seconds that it took)
        super().__init__(addresses, key, block_size)

    def _handle(self, data: bytes) -> None:
        arrival, began = now()
        super()._handle(data)
        self.messages.append((arrival, time.thread_time() - began))


class _Driver:
    """Submits a case's requests and takes in what comes back, as LLM does."""

    def __init__(self, client: _TimedClient, case: OverheadCase) -> None:
        self._client = client
        self._case = case
        self._ledger = Ledger()
        self._arrived: SimpleQueue[list[OutputDelta] | MoeRuntimeError] = SimpleQueue()
        self._ledger_s = 0.0
        self._num_tokens = 0
        self._first = (0.0, 0)  # time and tokens when all sequences had got some tokens
        self._last = (0.0, 0)

    def run(self, until: Callable[[], bool]) -> None:
        """Return once `until` is true and half as many steps as wanted were seen from here."""
        case = self._case
        for request in _requests(case):
            self._ledger.add(request.request_id, None, [request])
            self._client.submit([request], self._arrived.put)
        settled = case.num_seqs * (case.max_tokens - case.num_steps - SLACK_STEPS)
        enough = case.num_seqs * (case.num_steps // 2 + 1)
        while self._last[1] - self._first[1] < enough or not until():
            item = self._arrived.get()
            if isinstance(item, MoeRuntimeError):
                raise item
            began = time.thread_time()
            for delta in item:
                self._ledger.apply(delta)
                self._num_tokens += len(delta.new_token_ids)
            arrival, ended = now()
            if self._num_tokens >= settled:
                self._first = self._first if self._first[1] else (arrival, self._num_tokens)
                self._last = (arrival, self._num_tokens)
                self._ledger_s += ended - began

    def result(self) -> dict[str, Any]:
        """Numbers as seen from outside, and what the driver itself spent."""
        seconds, tokens = self._last[0] - self._first[0], self._last[1] - self._first[1]
        handling = [taken for arrival, taken in self._client.messages if arrival >= self._first[0]]
        steps = tokens / self._case.num_seqs
        return {
            "tokens": tokens,
            "tokens_per_s": round(tokens / seconds, 1),
            "step_us_outside": round(1e6 * seconds / steps, 3),
            "driver_us": {
                "decoding": round(1e6 * sum(handling) / steps, 1),
                "ledger": round(1e6 * self._ledger_s / steps, 1),
            },
        }


def _requests(case: OverheadCase) -> list[EngineRequest]:
    rng = random.Random(case.num_seqs)
    params = SamplingParams(**_SAMPLING[case.sampling], max_tokens=case.max_tokens, ignore_eos=True)
    return [
        EngineRequest(
            request_id=f"overhead-{number}",
            sample_index=0,
            prompt_token_ids=tuple(rng.randrange(_PROMPT_TOKENS) for _ in range(case.prompt_len)),
            params=params,
            seed=number,
        )
        for number in range(case.num_seqs)
    ]


def _table(results: list[dict[str, Any]], gloo_us: float) -> TextTable:
    columns = ("case", "step", "step CPU", *RANK_PARTS, "outside", "decode", "ledger")
    rows = [
        (
            f"{r['num_seqs']} {r['sampling']} of {r['vocab_size']:,}",
            *(f"{r[key]:,.0f}" for key in ("step_us", "step_cpu_us")),
            *(f"{r['parts_cpu_us'][part]:,.0f}" for part in RANK_PARTS),
            f"{r['step_us_outside']:,.0f}",
            *(f"{r['driver_us'][part]:,.0f}" for part in ("decoding", "ledger")),
        )
        for r in results
    ]
    title = (
        "Microseconds a step (medians; parts in CPU time of their thread, the last two in the driver); "
        f"with 2 ranks over gloo agreeing adds {gloo_us:.0f}"
    )
    return TextTable(title=title, columns=columns, rows=tuple(rows))


def draw(results: Sequence[Mapping[str, Any]], prefix: str) -> None:
    """A step's parts on the clock, stacked, by running sequences, into PREFIX.png and PREFIX.svg.

    A panel for each vocabulary and way of sampling: their steps differ by more than a bar can show.
    """
    kinds = list(dict.fromkeys((result["vocab_size"], result["sampling"]) for result in results))
    figure = new_figure(max(8.0, 4.5 * len(kinds)), 4.5)  # the legend of all parts needs 8 inches
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        chosen = [result for result in results if (result["vocab_size"], result["sampling"]) == kind]
        names = [str(result["num_seqs"]) for result in chosen]
        below = [0.0] * len(chosen)
        for part in RANK_PARTS:
            heights = [result["parts_us"][part] for result in chosen]
            axes.bar(names, heights, 0.6, bottom=below, label=part)
            below = [base + height for base, height in zip(below, heights, strict=True)]
        axes.set(title=f"{kind[1]} of {kind[0]:,}", xlabel="running sequences", ylabel="µs a step")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(RANK_PARTS), fontsize="small")
    save_figure(figure, prefix)
