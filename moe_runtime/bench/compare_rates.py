"""Rates and ratios of systems that took turns: as results, tables and a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from moe_runtime.bench.offline import warn_if_short
from moe_runtime.bench.plots import new_figure, save_figure
from moe_runtime.bench.report import TextTable
from moe_runtime.bench.turns import Shape, Turn, Turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """One rate in one shape: a row of the tables. Systems are in their order, this project first."""

    shape: Shape
    metric: str  # a key of _METRICS
    by_round: Mapping[str, tuple[float, ...]]  # tokens/s of each system in each round
    seconds: Mapping[str, tuple[float, ...]]  # of whole batches
    details: Mapping[str, Mapping[str, Any]]  # settings of this shape, by system that has any
    equal_outputs: Mapping[str, float]  # share of requests whose tokens are ours, by peer

    @property
    def medians(self) -> dict[str, float]:
        """Tokens/s of each system."""
        return {name: median(rates) for name, rates in self.by_round.items()}

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as fast as each peer we are: the median of the rounds' ratios."""
        ours, *peers = self.by_round
        return {
            peer: median(a / b for a, b in zip(self.by_round[ours], self.by_round[peer], strict=True))
            for peer in peers
        }

    @property
    def best_peer(self) -> str | None:
        """The fastest of them, if there is one."""
        peers = list(self.by_round)[1:]
        return max(peers, key=self.medians.__getitem__, default=None)

    @property
    def spread(self) -> dict[str, float]:
        """Each system's fastest round by its slowest."""
        return {name: max(rates) / min(rates) for name, rates in self.by_round.items()}

    def to_dict(self) -> dict[str, Any]:
        """A result of the JSON object."""
        systems = {
            name: {
                "tokens_per_s": round(self.medians[name], 2),
                "rounds": [round(rate, 2) for rate in self.by_round[name]],
                "seconds": [round(s, 6) for s in self.seconds[name]],
                "slowest_by_fastest": round(self.spread[name], 3),
                **({"details": dict(self.details[name])} if name in self.details else {}),
            }
            for name in self.by_round
        }
        return {
            "workload": self.shape.kind,
            "requests": self.shape.num_requests,
            "input_len": self.shape.input_len,
            "output_len": self.shape.output_len,
            "metric": self.metric,
            "systems": systems,
            "ratios": {peer: round(ratio, 3) for peer, ratio in self.ratios.items()},
            "best_peer": self.best_peer,
            "equal_outputs": {peer: round(share, 3) for peer, share in self.equal_outputs.items()},
        }


def _output_rate(shape: Shape, turn: Turn) -> float | None:
    return shape.num_requests * shape.output_len / turn.seconds


def _decode_rate(shape: Shape, turn: Turn) -> float | None:
    seconds = turn.decode_seconds
    if seconds is None or seconds <= 0 or not turn.decode_tokens:
        return None
    return turn.decode_tokens / seconds


def _prefill_rate(shape: Shape, turn: Turn) -> float | None:
    return shape.num_requests * shape.input_len / turn.seconds


# What a turn says of a kind of shape, in tokens/s; None where the system cannot say it.
_METRICS: Mapping[str, Mapping[str, Callable[[Shape, Turn], float | None]]] = {
    "decode": {"output tokens/s, prefill included": _output_rate, "decode tokens/s": _decode_rate},
    "prefill": {"prompt tokens/s": _prefill_rate},
}


def rates_of(shape: Shape, turns: Turns) -> list[Rates]:
    """Every metric of a shape that all its systems have in all their turns."""
    found = []
    for name, own in turns.items():
        decodes = [turn.decode_seconds for turn in own if turn.decode_seconds is not None]
        if shape.kind == "decode" and decodes and shape.output_len > 1:
            warn_if_short(f"{name}, {shape}: decode", min(decodes))
    details = {name: own[-1].details for name, own in turns.items() if own[-1].details}
    for metric, rate in _METRICS[shape.kind].items():
        by_round = {name: _all_known(rate(shape, turn) for turn in own) for name, own in turns.items()}
        if not all(by_round.values()):
            continue
        found.append(
            Rates(
                shape=shape,
                metric=metric,
                by_round=by_round,
                seconds={name: tuple(turn.seconds for turn in own) for name, own in turns.items()},
                details=details,
                equal_outputs=_equal_outputs(turns),
            )
        )
    return found


def _all_known(rates: Iterable[float | None]) -> tuple[float, ...]:
    """All of them, or none where one is not known."""
    values = list(rates)
    known = tuple(value for value in values if value is not None)
    return known if len(known) == len(values) else ()


def _equal_outputs(turns: Turns) -> dict[str, float]:
    """Share of requests whose tokens are all the same as ours, by peer."""
    ours, *peers = turns
    shares = {}
    for peer in peers:
        equal = [
            a == b
            for mine, theirs in zip(turns[ours], turns[peer], strict=True)
            for a, b in zip(mine.tokens, theirs.tokens, strict=True)
        ]
        shares[peer] = sum(equal) / len(equal)
    return shares


def rates_table(rates: Sequence[Rates]) -> TextTable:
    """Tokens/s of everyone."""
    systems = _systems(rates)
    rows = tuple(
        (
            str(row.shape),
            row.metric.removesuffix(", prefill included"),
            *(f"{row.medians[name]:,.1f}" if name in row.medians else "-" for name in systems),
            row.best_peer or "-",
            "-" if row.best_peer is None else f"{row.ratios[row.best_peer]:.2f}",
            f"{max(row.spread.values()):.2f}",
        )
        for row in rates
    )
    num_rounds = max((len(own) for row in rates for own in row.by_round.values()), default=0)
    rounds = "1 round" if num_rounds == 1 else f"median of {num_rounds} rounds"
    return TextTable(
        title=f"tokens/s, {rounds}; output tokens/s include prefill",
        columns=("workload", "rate", *systems, "best peer", "ours / best", "slowest/fastest"),
        rows=rows,
    )


def ratio_table(rates: Sequence[Rates], in_float32: frozenset[str]) -> TextTable:
    """How many times as fast as each peer we are, and how many requests got the same tokens where that is due."""
    peers = _systems(rates)[1:]
    if not peers:
        return TextTable(title="", columns=("workload",), rows=())
    comparable = [name for name in peers if name in in_float32]
    rows = tuple(
        (
            str(row.shape),
            row.metric.removesuffix(", prefill included"),
            *(f"{row.ratios[name]:.2f}" if name in row.ratios else "-" for name in peers),
            *(f"{row.equal_outputs[name]:.0%}" if name in row.equal_outputs else "-" for name in comparable),
        )
        for row in rates
    )
    columns = (
        "workload",
        "rate",
        *(f"/ {name}" for name in peers),
        *(f"equal to {name}" for name in comparable),
    )
    return TextTable(title="ours by each peer's, median of the rounds' ratios", columns=columns, rows=rows)


def _systems(rates: Sequence[Rates]) -> list[str]:
    """Everyone who was measured anywhere, in order."""
    return list(dict.fromkeys(name for row in rates for name in row.by_round))


def draw(results: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], prefix: str) -> None:
    """Grouped bars of tokens/s, ours and the peers', into PREFIX.png and PREFIX.svg; a panel for each rate.

    Args:
        results: of the report, which a saved JSON object holds as well.
    """
    metrics = list(dict.fromkeys(result["metric"] for result in results))
    systems = list(dict.fromkeys(name for result in results for name in result["systems"]))
    figure = new_figure(width=5.0 * len(metrics), height=4.5)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    width = 0.8 / len(systems)
    for panel, metric in zip(panels, metrics, strict=True):
        group = [result for result in results if result["metric"] == metric]
        for number, name in enumerate(systems):
            label = f"{name} ({facts['our_weights']})" if number == 0 else name
            places = [i + (number - (len(systems) - 1) / 2) * width for i in range(len(group))]
            heights = [result["systems"].get(name, {}).get("tokens_per_s", 0.0) for result in group]
            panel.bar(places, heights, width, label=label)
        of_prompt = group[0]["workload"] == "prefill"
        names = [str(result["input_len" if of_prompt else "requests"]) for result in group]
        panel.set_xticks(range(len(group)), names)
        panel.set_xlabel("tokens of the prompt" if of_prompt else "requests at once")
        panel.set_ylabel(metric)
    panels[0].legend(fontsize="small")
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    figure.suptitle(f"{facts['model']}, {threads} each")
    save_figure(figure, prefix)
