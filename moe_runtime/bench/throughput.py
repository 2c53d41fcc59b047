"""`bench throughput`: tokens a second of whole batches, from random prompts.

Every concurrency is measured in rounds; a round submits that many requests at once and waits for all of them.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from moe_runtime.bench.offline import deployment_facts, greedy, random_batch
from moe_runtime.bench.plots import new_figure, save_figure
from moe_runtime.bench.report import Report, TextTable, load_average
from moe_runtime.errors import ConfigError
from moe_runtime.request import PromptInput

if TYPE_CHECKING:
    from moe_runtime.llm import LLM

logger = logging.getLogger(__name__)

_WARMUP_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputWorkload:
    """What `bench throughput` runs."""

    concurrency: tuple[int, ...] = (1, 8, 32)  # requests at once
    input_len: int = 128  # tokens of each prompt
    output_len: int = 128  # tokens generated for each
    num_rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1:
            raise ConfigError(
                f"concurrency must be whole numbers of at least 1, got {list(self.concurrency)}"
            )
        for name in ("input_len", "output_len", "num_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def run_throughput(model: str | None, workload: ThroughputWorkload, llm_args: Mapping[str, Any]) -> Report:
    """Start a deployment, measure, end it.

    Args:
        model: as in LLM.
        llm_args: further arguments of LLM.

    Raises:
        UserError: whatever LLM refuses.
    """
    from moe_runtime.llm import LLM

    started_load = load_average()
    max_model_len = workload.input_len + workload.output_len
    with LLM(model, use_tqdm=False, **{"max_model_len": max_model_len, **llm_args}) as llm:
        results = [_measure(llm, concurrency, workload) for concurrency in workload.concurrency]
        facts = {**deployment_facts(llm), **asdict(workload)}
        device = llm.ranks[0].device
    return Report(
        benchmark="throughput",
        device=device,
        started_load=started_load,
        workload=facts,
        results=results,
        tables=[_table(results, workload)],
    )


def _measure(llm: LLM, concurrency: int, workload: ThroughputWorkload) -> dict[str, Any]:
    """Rounds at one concurrency."""
    rng = random.Random(f"{workload.seed}-{concurrency}")

    def batch() -> list[PromptInput]:
        return [*random_batch(rng, concurrency, workload.input_len, llm.info.vocab_size)]

    llm.generate(batch(), greedy(min(_WARMUP_TOKENS, workload.output_len)), use_tqdm=False)
    seconds = []
    for number in range(workload.num_rounds):
        prompts = batch()
        began = time.perf_counter()
        llm.generate(prompts, greedy(workload.output_len), use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        logger.info("%d requests, round %d took %.2f s", concurrency, number + 1, seconds[-1])
    return _result(seconds, concurrency, workload)


def _result(seconds: Sequence[float], concurrency: int, workload: ThroughputWorkload) -> dict[str, Any]:
    output_tokens = concurrency * workload.output_len
    total_tokens = output_tokens + concurrency * workload.input_len
    return {
        "concurrency": concurrency,
        "output_tokens": output_tokens,  # of one round
        "total_tokens": total_tokens,
        "seconds": [round(s, 6) for s in seconds],
        "output_tokens_per_s": round(output_tokens / median(seconds), 2),
        "total_tokens_per_s": round(total_tokens / median(seconds), 2),
        "slowest_by_fastest": round(max(seconds) / min(seconds), 3),
    }


def _table(results: Sequence[Mapping[str, Any]], workload: ThroughputWorkload) -> TextTable:
    rows = tuple(
        (
            str(result["concurrency"]),
            *(f"{result[key]:,.1f}" for key in ("output_tokens_per_s", "total_tokens_per_s")),
            f"{result['slowest_by_fastest']:.2f}",
        )
        for result in results
    )
    title = (
        f"{workload.input_len} tokens in, {workload.output_len} out, median of {workload.num_rounds} rounds"
    )
    columns = ("requests", "output tokens/s", "total tokens/s", "slowest/fastest round")
    return TextTable(title=title, columns=columns, rows=rows)


def draw(results: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], prefix: str) -> None:
    """Tokens/s by requests at once, a point for each round, into PREFIX.png and PREFIX.svg.

    Args:
        results: of the report, which a saved JSON object holds as well.
        facts: its workload.
    """
    ordered = sorted(results, key=lambda result: result["concurrency"])
    sizes = [result["concurrency"] for result in ordered]
    figure = new_figure()
    axes = figure.subplots()
    for kind in ("output", "total"):
        (line,) = axes.plot(sizes, [result[f"{kind}_tokens_per_s"] for result in ordered], "o-", label=kind)
        for result in ordered:
            rates = [result[f"{kind}_tokens"] / seconds for seconds in result["seconds"]]
            places = [result["concurrency"]] * len(rates)
            axes.plot(places, rates, ".", color=line.get_color(), alpha=0.4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    title = f"{facts['input_len']} tokens in, {facts['output_len']} out"
    axes.set(title=title, xlabel="requests at once", ylabel="tokens/s")
    axes.legend(frameon=False)
    save_figure(figure, prefix)
