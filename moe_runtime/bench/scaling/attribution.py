"""Efficiency, and which part of a step takes what is missing to 1.

With b ranks a token costs t_b seconds of the deployment's time, with N ranks t_N. Perfect scaling, strong or weak, is
t_N = t_b * b / N, so

    efficiency = t_b * b / (N * t_N),    1 - efficiency = (t_N - t_b * b / N) / t_N.

The costs of the parts add up to t, so the same difference taken for each part adds up to what is missing: a part that
shrinks as it should takes nothing, one that grows takes much, one that shrinks by more gives some back.

t is that of served rounds, the parts are those of timed ones. What both differ by is a part of its own, "untimed".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_runtime.bench.scaling.phases import PARTS, PhaseRate, PhaseSample

UNTIMED = "untimed"  # what a token costs as it is served, less what it costs where every step is timed
# What is shown together: the ranks meet in both.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "experts": ("experts",),
    "dispatch + combine": ("dispatch", "combine"),
    "waiting": ("waiting",),
    "attention": ("attention",),
    "other": ("other",),
    "outside": ("outside",),
    UNTIMED: (UNTIMED,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseCost:
    """One phase at one number of ranks: the median round of each kind."""

    num_ranks: int
    served: PhaseRate
    timed: PhaseSample

    def of_token(self) -> dict[str, float]:
        """Seconds by PARTS and UNTIMED; they add up to those of a token that is served."""
        parts = {part: seconds / self.timed.tokens for part, seconds in self.timed.mean.items()}
        return {**parts, UNTIMED: 1 / self.served.tokens_per_s - self.timed.seconds / self.timed.tokens}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """One phase at one number of ranks, beside the same phase with the fewest."""

    speedup: float  # in tokens a second; the ratio of the numbers of ranks is perfect
    efficiency: float  # 1 is perfect
    loss: Mapping[str, float]  # by PARTS and UNTIMED, as shares of the time; they add up to 1 - efficiency
    shrinkage: Mapping[str, float | None]  # by PARTS: t_b / t_N of the part; None: it took no time

    def of_groups(self) -> dict[str, float]:
        """The losses by GROUPS."""
        return {name: sum(self.loss[part] for part in parts) for name, parts in GROUPS.items()}


def attribute(base: PhaseCost, scaled: PhaseCost) -> Attribution:
    """Compare `scaled` with `base`, which has fewer ranks."""
    perfect = base.num_ranks / scaled.num_ranks
    whole = 1 / scaled.served.tokens_per_s
    before, after = base.of_token(), scaled.of_token()
    speedup = 1 / base.served.tokens_per_s / whole
    return Attribution(
        speedup=speedup,
        efficiency=speedup * perfect,
        loss={part: (after[part] - before[part] * perfect) / whole for part in after},
        shrinkage={part: before[part] / after[part] if after[part] > 0 else None for part in PARTS},
    )


def explain(attribution: Attribution, num_ranks: int, base_ranks: int = 1) -> list[str]:
    """A few sentences that say where the loss goes, the largest first."""
    loss = attribution.of_groups()
    missing = 1 - attribution.efficiency
    sentences = [
        f"{num_ranks} ranks are {attribution.speedup:.2f} times as fast as {base_ranks}, of "
        f"{num_ranks / base_ranks:g} at best: an efficiency of {attribution.efficiency:.0%}."
    ]
    if missing <= 0:
        return [*sentences, "Nothing is lost."]
    causes = sorted((share, name) for name, share in loss.items() if share >= 0.005)[::-1]
    listed = ", ".join(f"{name} {100 * share:.1f}" for share, name in causes)
    sentences.append(f"Of the {100 * missing:.1f} points that are missing go to: {listed}.")
    sentences += [_SENTENCES[name](attribution, num_ranks / base_ranks) for _, name in causes[:3]]
    gains = [f"{name} {-100 * share:.1f}" for name, share in loss.items() if share <= -0.005]
    if gains:
        sentences.append(
            f"Some points come back where a part shrank by more than it had to: {', '.join(gains)}."
        )
    return sentences


def _shrinkage(attribution: Attribution, part: str, perfect: float) -> str:
    found = attribution.shrinkage[part]
    return f"became {found:.2f} times as fast, of {perfect:g}" if found is not None else "took no time"


_SENTENCES = {
    "experts": lambda a, n: (
        f"Experts {_shrinkage(a, 'experts', n)}: a rank reads its own experts' weights however few tokens come, and "
        "those tokens come from all ranks."
    ),
    "dispatch + combine": lambda a, n: (
        f"Carrying tokens takes {100 * a.loss['dispatch']:.1f} points on the way to the experts and "
        f"{100 * a.loss['combine']:.1f} on the way back; one rank alone only counts tokens there."
    ),
    "waiting": lambda a, n: (
        "Ranks wait for others: at each layer for the one with the most tokens or the slowest core, before each step "
        "for the last to come."
    ),
    "attention": lambda a, n: (
        f"Attention {_shrinkage(a, 'attention', n)}: each rank computes its own sequences, in smaller batches that "
        "use their weights less often."
    ),
    "other": lambda a, n: (
        f"All else in a step {_shrinkage(a, 'other', n)}: router, shared expert, norms, sampling and scheduling have "
        "a price that does not fall with the tokens of a step."
    ),
    "outside": lambda a, n: (
        "The driver and the way of requests and tokens take the same time for any number of ranks."
    ),
    UNTIMED: lambda a, n: (
        "Untimed is what the baseline gains more than these ranks where steps are not timed: CPU ranks then compute "
        "all layers in one call, if there is one or they share memory."
    ),
}
