"""`bench throughput`: tokens a second of whole batches, from random prompts, against a peer if asked for.

Every concurrency is measured in rounds; a round submits that many requests at once and waits for all of them.
With a peer the two take turns within each round, so that whatever else the machine does meets both alike.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from moe_runtime.bench.report import Report, TextTable, load_average
from moe_runtime.errors import ConfigError
from moe_runtime.request import PromptInput, SamplingParams

if TYPE_CHECKING:
    from moe_runtime.llm import LLM

logger = logging.getLogger(__name__)

PEERS = ("transformers",)
_WARMUP_TOKENS = 4

# Prompts and the number of tokens wanted after each, to the tokens.
Generate = Callable[[Sequence[list[int]], int], list[list[int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputWorkload:
    """What `bench throughput` runs."""

    concurrency: tuple[int, ...] = (1, 8, 32)  # requests at once
    input_len: int = 128  # tokens of each prompt
    output_len: int = 128  # tokens generated for each
    num_rounds: int = 3
    seed: int = 0
    compare: str | None = None  # one of PEERS
    compare_dtype: str = "float32"
    compare_experts: str = "grouped_mm"  # the faster of transformers' ways on CPUs

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1:
            raise ConfigError(
                f"concurrency must be whole numbers of at least 1, got {list(self.concurrency)}"
            )
        for name in ("input_len", "output_len", "num_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.compare not in (None, *PEERS):
            raise ConfigError(f"compare must be one of {', '.join(PEERS)}, got {self.compare!r}")


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
        generators: dict[str, Generate] = {"moe_runtime": _ours(llm)}
        if workload.compare is not None:
            generators[workload.compare] = _peer(llm, workload)
        results = [
            _measure(generators, concurrency, workload, llm.info.vocab_size)
            for concurrency in workload.concurrency
        ]
        facts = {
            "model": llm.files.name,
            "parameters": llm.info.num_parameters,
            "dtype": llm.config.dtype if llm.config.dtype != "auto" else llm.info.dtype,
            "expert_parallel_size": llm.config.expert_parallel_size,
            "threads_per_rank": llm.ranks[0].threads,
            **asdict(workload),
        }
        device = llm.ranks[0].device
    return Report(
        benchmark="throughput",
        device=device,
        started_load=started_load,
        workload=facts,
        results=results,
        tables=[_table(results, workload)],
    )


def _ours(llm: LLM) -> Generate:
    def generate(prompts: Sequence[list[int]], output_len: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        inputs: list[PromptInput] = list(prompts)
        return [output.outputs[0].token_ids for output in llm.generate(inputs, params, use_tqdm=False)]

    return generate


def _peer(llm: LLM, workload: ThroughputWorkload) -> Generate:
    from moe_runtime.bench.transformers_peer import TransformersPeer

    return TransformersPeer(
        Path(llm.files.path),
        dtype=workload.compare_dtype,
        experts=workload.compare_experts,
        num_threads=sum(rank.threads for rank in llm.ranks),
    ).generate


def _measure(
    generators: Mapping[str, Generate], concurrency: int, workload: ThroughputWorkload, vocab_size: int
) -> dict[str, Any]:
    """Rounds at one concurrency; each system's seconds, and the same for all."""
    rng = random.Random(f"{workload.seed}-{concurrency}")

    def prompts() -> list[list[int]]:
        """New ones each time, so that nothing is found in a cache."""
        return [[rng.randrange(vocab_size) for _ in range(workload.input_len)] for _ in range(concurrency)]

    for generate in generators.values():
        generate(prompts(), min(_WARMUP_TOKENS, workload.output_len))
    seconds: dict[str, list[float]] = {name: [] for name in generators}
    num_equal = 0
    for number in range(workload.num_rounds):
        batch = prompts()
        outputs = {}
        order = list(generators)[:: -1 if number % 2 else 1]
        for name in order:
            began = time.perf_counter()
            outputs[name] = generators[name](batch, workload.output_len)
            seconds[name].append(time.perf_counter() - began)
            logger.info(
                "%d requests, round %d: %s took %.2f s", concurrency, number + 1, name, seconds[name][-1]
            )
        num_equal += sum(len(set(map(tuple, tokens))) == 1 for tokens in zip(*outputs.values(), strict=True))
    return _result(seconds, concurrency, workload, num_equal)


def _result(
    seconds: Mapping[str, list[float]], concurrency: int, workload: ThroughputWorkload, num_equal: int
) -> dict[str, Any]:
    output_tokens = concurrency * workload.output_len
    total_tokens = output_tokens + concurrency * workload.input_len
    ours, *peers = (
        {
            "seconds": [round(s, 4) for s in taken],
            "output_tokens_per_s": round(output_tokens / median(taken), 2),
            "total_tokens_per_s": round(total_tokens / median(taken), 2),
            "slowest_by_fastest": round(max(taken) / min(taken), 3),
        }
        for taken in seconds.values()
    )
    result: dict[str, Any] = {
        "concurrency": concurrency,
        "output_tokens": output_tokens,  # of one round
        "total_tokens": total_tokens,
        **ours,
    }
    for name, peer in zip(list(seconds)[1:], peers, strict=True):
        ratios = [theirs / mine for mine, theirs in zip(*seconds.values(), strict=True)]
        result[name] = peer
        result["ratio"] = round(median(ratios), 3)  # how many times as fast as the peer, round by round
        result["equal_outputs"] = round(num_equal / (concurrency * workload.num_rounds), 3)
    return result


def _table(results: Sequence[Mapping[str, Any]], workload: ThroughputWorkload) -> TextTable:
    columns = ["requests", "output tokens/s", "total tokens/s", "slowest/fastest round"]
    rows = []
    for result in results:
        row = [str(result["concurrency"])]
        row += [f"{result[key]:,.1f}" for key in ("output_tokens_per_s", "total_tokens_per_s")]
        row.append(f"{result['slowest_by_fastest']:.2f}")
        if workload.compare is not None:
            row.append(f"{result[workload.compare]['output_tokens_per_s']:,.1f}")
            row += [f"{result['ratio']:.2f}", f"{result['equal_outputs']:.0%}"]
        rows.append(tuple(row))
    if workload.compare is not None:
        columns += [f"{workload.compare} output tokens/s", "ratio", "equal outputs"]
    title = (
        f"{workload.input_len} tokens in, {workload.output_len} out, median of {workload.num_rounds} rounds"
    )
    return TextTable(title=title, columns=tuple(columns), rows=tuple(rows))
