"""Starting the deployments of a comparison and giving them requests, in turns where they can live side by side."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_runtime.bench.offline import greedy, random_batch, short_name
from moe_runtime.bench.scaling.phases import ServedRound, TimedRound, read_served, read_timed
from moe_runtime.bench.scaling.workload import Layout, ScalingWorkload
from moe_runtime.errors import ConfigError
from moe_runtime.experts.trace import RoutingTrace
from moe_runtime.request import PromptInput

if TYPE_CHECKING:
    from moe_runtime.llm import LLM
    from moe_runtime.rank_spec import RankStats

logger = logging.getLogger(__name__)

_WARMUP_TOKENS = 4
_READ_S = 0.2  # that ranks read their weights for, to see how fast they can


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutFacts:
    """What a deployment said of itself."""

    threads: tuple[int, ...]  # of each rank
    devices: tuple[str, ...]
    nodes: tuple[str, ...]
    dispatcher: str  # and why


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """All rounds of all deployments."""

    served: Mapping[tuple[str, Layout], list[ServedRound]]  # by mode and layout
    timed: Mapping[tuple[str, Layout], list[TimedRound]]
    # Bytes a second at which all ranks together read their weights, before each served round; None: unknown.
    read_speeds: Mapping[tuple[str, Layout], list[float | None]]
    facts: Mapping[Layout, LayoutFacts]
    model: Mapping[str, Any]  # name, parameters, dtype
    interleaved: bool


def measure(
    model: str | None,
    workload: ScalingWorkload,
    llm_args: Mapping[str, Any],
    trace: RoutingTrace | None = None,
) -> Measurements:
    """Start the layouts, all at once or one after another, and measure their rounds.

    Args:
        llm_args: further arguments of LLM.
        trace: its choices take the place of the routers'.

    Raises:
        UserError: whatever LLM refuses; `same_cores` on GPUs; a trace of another model.
    """
    from moe_runtime.cluster import resolve_device
    from moe_runtime.connecting import ensure_ray

    layouts = workload.layouts(llm_args.get("threads_per_rank"))
    owns_ray = ensure_ray()  # one Ray for all: an LLM that started it would end it for the others
    try:
        on_gpus = resolve_device(llm_args.get("device", "auto")) == "cuda"
        if on_gpus and workload.same_cores:
            raise ConfigError(
                "same_cores compares CPU threads, and these ranks compute on GPUs; leave it out"
            )
        at_once = workload.interleave
        if at_once is None:
            at_once = not on_gpus or _num_gpus() >= sum(layout.num_ranks for layout in layouts)
        session = _Session(model, workload, llm_args, trace, _serving_interval(on_gpus))
        for group in [layouts] if at_once else [[layout] for layout in layouts]:
            session.run(group)
        return Measurements(
            served=session.served,
            timed=session.timed,
            read_speeds=session.read_speeds,
            facts=session.facts,
            model=session.model_facts,
            interleaved=at_once,
        )
    finally:
        if owns_ray:
            import ray

            ray.shutdown()


class _Session:
    """Collects the rounds of groups of deployments."""

    def __init__(
        self,
        model: str | None,
        workload: ScalingWorkload,
        llm_args: Mapping[str, Any],
        trace: RoutingTrace | None,
        serving_interval: int,
    ) -> None:
        """
        Args:
            serving_interval: steps of which a rank that serves times one.
        """
        self._model = model
        self._workload = workload
        self._llm_args = llm_args
        self._trace = trace
        self._serving_interval = serving_interval
        self.served: dict[tuple[str, Layout], list[ServedRound]] = {}
        self.timed: dict[tuple[str, Layout], list[TimedRound]] = {}
        self.read_speeds: dict[tuple[str, Layout], list[float | None]] = {}
        self.facts: dict[Layout, LayoutFacts] = {}
        self.model_facts: dict[str, Any] = {}

    def run(self, layouts: Sequence[Layout]) -> None:
        """Every mode, with all of these deployments alive."""
        with self._started(layouts) as llms:
            for mode in self._workload.modes:
                # Before the warm-up: the first step that is timed counts for those since the last one.
                _time_one_of(llms.values(), 1)
                for layout, llm in llms.items():
                    self._generate(llm, mode, layout, 0, min(_WARMUP_TOKENS, self._workload.output_len))
                for layout, number in _turns(llms, 1, self._workload.num_timed):
                    timed = self._timed_round(llms[layout], mode, layout, number)
                    self.timed.setdefault((mode, layout), []).append(timed)
                _time_one_of(llms.values(), self._serving_interval)
                first = 1 + self._workload.num_timed
                for layout, number in _turns(llms, first, self._workload.num_served):
                    self.read_speeds.setdefault((mode, layout), []).append(_read_speed(llms[layout]))
                    served = self._served_round(llms[layout], mode, layout, number)
                    self.served.setdefault((mode, layout), []).append(served)

    @contextlib.contextmanager
    def _started(self, layouts: Sequence[Layout]) -> Iterator[dict[Layout, LLM]]:
        from moe_runtime.llm import LLM

        with contextlib.ExitStack() as stack:
            llms = {}
            for layout in layouts:
                args = self._workload.engine_args(layout, self._llm_args)
                llm = stack.enter_context(LLM(self._model, use_tqdm=False, **args))
                _prepare(llm, self._trace)
                llms[layout] = llm
                self.facts[layout] = _facts(llm)
            self.model_facts = {
                "model": short_name(llm.files.name),
                "parameters": llm.info.num_parameters,
                "experts": llm.info.num_experts,
                "dtype": llm.config.dtype if llm.config.dtype != "auto" else llm.info.dtype,
            }
            yield llms

    def _timed_round(self, llm: LLM, mode: str, layout: Layout, number: int) -> TimedRound:
        before = _settled(llm)
        seconds, first_token_s = self._generate(llm, mode, layout, number, self._workload.output_len)
        logger.info("%s, %s, round %d, steps timed: %.2f s", mode, layout.label, number, seconds)
        return read_timed(seconds, first_token_s, before, _settled(llm))

    def _served_round(self, llm: LLM, mode: str, layout: Layout, number: int) -> ServedRound:
        output_len = self._workload.output_len
        before = _settled(llm)
        seconds, first_token_s = self._generate(llm, mode, layout, number, output_len)
        logger.info("%s, %s, round %d: %.2f s", mode, layout.label, number, seconds)
        return read_served(seconds, first_token_s, output_len, before, _settled(llm))

    def _generate(
        self, llm: LLM, mode: str, layout: Layout, number: int, output_len: int
    ) -> tuple[float, float]:
        """Seconds for a round's requests, and until the last of them had its first token.

        All layouts get the same requests, which no earlier round had.
        """
        workload = self._workload
        rng = random.Random(f"{workload.seed}-{mode}-{number}")
        prompts: list[PromptInput] = [
            *random_batch(rng, workload.num_requests(mode, layout), workload.input_len, llm.info.vocab_size)
        ]
        params = greedy(output_len)
        began = time.monotonic()  # the clock of a request's metrics
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.monotonic() - began
        first_tokens = [output.metrics.first_token_time for output in outputs if output.metrics is not None]
        return seconds, max(at for at in first_tokens if at is not None) - began


def _prepare(llm: LLM, trace: RoutingTrace | None) -> None:
    """Have a trace followed.

    Raises:
        ConfigError: the trace is of another model.
    """
    if trace is not None:
        info = llm.info
        trace.check_fits(info.num_experts, len(info.moe_layers), info.num_experts_per_tok)
        llm.collective_rpc("probe", ("replay_choices", trace.choices_TK))


def _turns(layouts: Iterable[Layout], first: int, num_rounds: int) -> Iterator[tuple[Layout, int]]:
    """Each layout once in each round, with the round's number; there and back, so that none is always first."""
    for number in range(first, first + num_rounds):
        for layout in list(layouts)[:: -1 if number % 2 else 1]:
            yield layout, number


def _time_one_of(llms: Iterable[LLM], interval: int) -> None:
    for llm in llms:
        llm.collective_rpc("probe", ("measure_one_of", interval))


def _serving_interval(on_gpus: bool) -> int:
    from moe_runtime.timing.timer import DEVICE_INTERVAL, HOST_INTERVAL  # imports torch

    return DEVICE_INTERVAL if on_gpus else HOST_INTERVAL


def _read_speed(llm: LLM) -> float | None:
    """Bytes a second at which all ranks read their weights at once; None: some rank cannot tell."""
    speeds = llm.collective_rpc("probe", ("read_speed", _READ_S))
    return None if None in speeds else sum(speeds)


def _settled(llm: LLM) -> list[RankStats]:
    """Counters once the last step is counted: its tokens arrive before that."""
    llm.collective_rpc("probe", ("settle",))
    return llm.stats


def _facts(llm: LLM) -> LayoutFacts:
    return LayoutFacts(
        threads=tuple(rank.threads for rank in llm.ranks),
        devices=tuple(rank.device for rank in llm.ranks),
        nodes=tuple(rank.node_ip for rank in llm.ranks),
        dispatcher=llm.ranks[0].dispatcher,
    )


def _num_gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))
