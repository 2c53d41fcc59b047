"""From what ranks counted to the costs of prefill and decode. Nothing here measures; all of it adds up.

Timing every step changes what a step does, for a single CPU rank above all. So rounds are of two kinds: served as at
any other time, for rates, and with every step timed, for the split.

In a timed round prefill is every step in which some rank computed prompt tokens, decode all other steps. What the
round takes outside of steps belongs to decode where it comes after the last request's first token, else to prefill.
In a served round, where nobody times steps, prefill ends with that token. A token of prefill is one of a prompt, a
token of decode one that a decode step computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from moe_runtime.bench.scaling.workload import DECODE, PREFILL
from moe_runtime.metrics.balance import overall_balancedness, tokens_per_expert, tokens_per_rank
from moe_runtime.rank_spec import RankStats
from moe_runtime.timing.parts import Part

OUTSIDE = "outside"  # of steps: the driver, the way there and back, waking ranks that have parked
# In the order in which they are shown. Those of a phase add up to its time.
PARTS = ("attention", "experts", "dispatch", "combine", "waiting", "other", OUTSIDE)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRate:
    """One phase of one served round of one deployment."""

    seconds: float  # on the driver's clock
    tokens: float  # of all ranks

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRound:
    """One round of one deployment, as it serves."""

    seconds: float  # from the first request to the last token, as the driver sees it
    phases: Mapping[str, PhaseRate]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSample:
    """One phase of one timed round of one deployment."""

    seconds: float  # in its steps, of the rank that took longest, and outside of steps
    tokens: int  # of all ranks
    steps: int
    ranks: tuple[Mapping[str, float], ...]  # seconds by PARTS, of each rank

    @property
    def mean(self) -> dict[str, float]:
        """Seconds by PARTS, the mean over ranks; they add up to `seconds`."""
        return {part: sum(rank[part] for rank in self.ranks) / len(self.ranks) for part in PARTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRound:
    """One round of one deployment, every step of which was timed."""

    seconds: float  # from the first request to the last token, as the driver sees it
    phases: Mapping[str, PhaseSample]
    sent_bytes: Mapping[str, float]  # by dispatch and combine, over all layers, a token computed
    rank_balancedness: float | None  # mean / max of the ranks' share of all choices; None: no choices
    expert_balancedness: float | None


Round = TypeVar("Round", ServedRound, TimedRound)


def read_served(
    seconds: float,
    first_token_s: float,
    output_len: int,
    before: Sequence[RankStats],
    after: Sequence[RankStats],
) -> ServedRound:
    """What happened between two readings of all ranks' counters, `seconds` apart on the driver's clock.

    Args:
        first_token_s: seconds until the last request had its first token.
        output_len: tokens generated for each request.
    """
    num_decodes = _grown("decode_steps", before, after) // len(after)
    prompt_tokens = _grown("prompt_tokens", before, after)
    if not num_decodes:
        return ServedRound(
            seconds=seconds, phases={PREFILL: PhaseRate(seconds=seconds, tokens=prompt_tokens)}
        )
    # A request that comes last needs output_len - 1 steps more. Steps of decodes alone beyond these ran before, while
    # others waited for a place, and their tokens are not of the seconds that are counted.
    share = min(output_len - 1, num_decodes) / num_decodes
    decode = PhaseRate(seconds=seconds - first_token_s, tokens=share * _grown("decode_tokens", before, after))
    return ServedRound(
        seconds=seconds,
        phases={PREFILL: PhaseRate(seconds=first_token_s, tokens=prompt_tokens), DECODE: decode},
    )


def read_timed(
    seconds: float, first_token_s: float, before: Sequence[RankStats], after: Sequence[RankStats]
) -> TimedRound:
    """The same of a round with every step timed."""
    prompts = [_parts(b.prompt_step_parts, a.prompt_step_parts) for b, a in zip(before, after, strict=True)]
    steps = [_parts(b.step_parts, a.step_parts) for b, a in zip(before, after, strict=True)]
    decodes = [
        {part: rank[part] - of_prompts[part] for part in rank}
        for rank, of_prompts in zip(steps, prompts, strict=True)
    ]

    def grown(counter: str) -> int:
        return _grown(counter, before, after)

    num_steps, num_decodes = grown("steps") // len(steps), grown("decode_steps") // len(steps)
    decode_s = _longest(decodes)
    if num_decodes:
        outside_s = seconds - decode_s - _longest(prompts)
        decode_s += min(max(seconds - first_token_s - decode_s, 0.0), outside_s)
    phases = {PREFILL: _phase(prompts, seconds - decode_s, grown("prompt_tokens"), num_steps - num_decodes)}
    if num_decodes:
        phases[DECODE] = _phase(decodes, decode_s, grown("decode_tokens"), num_decodes)
    computed = grown("step_tokens")
    return TimedRound(
        seconds=seconds,
        phases=phases,
        sent_bytes={
            name: sum(a.sent_bytes[name] - b.sent_bytes[name] for b, a in zip(before, after, strict=True))
            / computed
            for name in ("dispatch", "combine")
        },
        rank_balancedness=overall_balancedness(tokens_per_rank(after) - tokens_per_rank(before)),
        expert_balancedness=overall_balancedness(tokens_per_expert(after) - tokens_per_expert(before)),
    )


def median_round(rounds: Sequence[Round], phase: str) -> Round:
    """The round whose phase took the median time; of an even number the faster of the two in the middle."""
    order = np.argsort([sample.phases[phase].seconds for sample in rounds], kind="stable")
    return rounds[int(order[(len(rounds) - 1) // 2])]


def _grown(counter: str, before: Sequence[RankStats], after: Sequence[RankStats]) -> int:
    """How much the ranks' counters grew, all together."""
    return int(sum(a.loop[counter] - b.loop[counter] for b, a in zip(before, after, strict=True)))


def _longest(ranks: Sequence[Mapping[str, float]]) -> float:
    return max(sum(rank.values()) for rank in ranks)


def _phase(ranks: Sequence[Mapping[str, float]], seconds: float, tokens: int, steps: int) -> PhaseSample:
    return PhaseSample(
        seconds=seconds,
        tokens=tokens,
        steps=steps,
        ranks=tuple({**rank, OUTSIDE: seconds - sum(rank.values())} for rank in ranks),
    )


def _parts(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Seconds by PARTS but OUTSIDE: both kinds of attention are one here."""
    grown = {part.label: after[part.label] - before[part.label] for part in Part}
    grown[Part.ATTENTION.label] += grown.pop(Part.LINEAR_ATTENTION.label)
    return grown
