"""The Markdown report of `bench scaling`: what was measured, on what, and where the loss goes, in words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_runtime.bench.report import Report, TextTable
from moe_runtime.bench.scaling.tables import read_range


def write_markdown(report: Report, file: str, plot: str | None) -> None:
    """Write the report beside its figure, which it refers to relative to itself.

    Args:
        plot: prefix of the figure's files, if there is one.
    """
    figure = None
    if plot is not None:
        figure = os.path.relpath(Path(f"{plot}.png").absolute(), Path(file).absolute().parent)
    Path(file).write_text(markdown(report, figure))


def markdown(report: Report, figure: str | None) -> str:
    """The report's text."""
    facts = report.to_dict()
    lines = ["# Scaling with expert parallelism", ""]
    lines += [f"{_summary(facts['workload'])} Measured on {facts['date'][:10]}.", ""]
    if figure is not None:
        lines += [f"![Throughput, efficiency and split of a step]({figure})", ""]
    lines += ["## Where the loss goes", ""]
    for result in report.results:
        if "explanation" in result:
            title = f"**{result['mode'].capitalize()} scaling, {result['phase']}, {result['layout']}.**"
            lines += [f"{title} {' '.join([*result['explanation'], *_beside(result)])}", ""]
    for table in report.tables:
        lines += [f"## {table.title}", "", *_table(table), ""]
    lines += ["## Environment", ""]
    for name in ("hardware", "versions", "workload"):
        lines += [f"* {name}: " + ", ".join(f"{key} {value}" for key, value in facts[name].items())]
    return "\n".join([*lines, ""])


def _summary(workload: Mapping[str, Any]) -> str:
    turns = (
        "Deployments took turns" if workload["interleaved"] else "One deployment was measured after another"
    )
    return (
        f"{workload['model']}, {workload['dtype']}: {workload['input_len']} tokens in and "
        f"{workload['output_len']} out, {workload['concurrency']} requests at once in all (strong scaling) or for "
        f"the smallest size (weak). {turns}. Throughput: the median of {workload['num_served_rounds']} rounds as "
        f"they are served. The split of a step: the median of {workload['num_timed_rounds']} others, with every step "
        "timed."
    )


def _beside(result: Mapping[str, Any]) -> list[str]:
    """Sentences on what the attribution does not say."""
    sent = result["sent_bytes_of_token"]
    sentences = [
        f"A token sends {sent['dispatch']:,.0f} bytes to experts of other ranks and {sent['combine']:,.0f} come back, "
        "over all layers."
    ]
    if speeds := read_range(result):
        sentences.append(f"Before its rounds all ranks together read their weights at {speeds} GB/s.")
    if result["rank_balancedness"] is not None:
        sentences.append(
            f"The average rank has {result['rank_balancedness']:.0%} of the work of the busiest (experts: "
            f"{result['expert_balancedness']:.0%})."
        )
    if "ratio_to_same_cores" in result:
        sentences.append(
            f"One rank with as many threads as all of these together: these are "
            f"{result['ratio_to_same_cores']:.2f} times as fast."
        )
    return sentences


def _table(table: TextTable) -> list[str]:
    rule = "|" + "|".join("---" if not i else "---:" for i in range(len(table.columns))) + "|"
    return [_row(table.columns), rule, *map(_row, table.rows)]


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.strip() for cell in cells) + " |"
