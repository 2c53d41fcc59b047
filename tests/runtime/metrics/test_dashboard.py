"""The dashboard and the documentation name what is exported, all of it and nothing else."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from prometheus_client import Metric

from moe_runtime.metrics.deployment_metrics import DeploymentMetrics
from tests.runtime.metrics.fakes import FakeClock, FakeRanks, make_report
from tests.source_tree import ROOT

_SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}


@pytest.fixture(scope="module")
def families() -> list[Metric]:
    ranks, clock = FakeRanks(), FakeClock()
    metrics = DeploymentMetrics.of(_deployment(ranks), model_name="m")  # type: ignore[arg-type]
    metrics._sampler._clock = clock
    for _ in range(2):  # so that there is a window with load
        ranks.compute(0, 0, 5)
        clock.now += 2
        found = list(metrics.registry.collect())
    assert all(family.samples for family in found)
    return found


def _deployment(ranks: FakeRanks) -> Any:
    class Deployment:
        stats = staticmethod(ranks.stats)

        class plan:  # noqa: N801 - an attribute of the real one
            class info:  # noqa: N801
                architecture = "Qwen3NextForCausalLM"

            class config:  # noqa: N801
                expert_parallel_size, dtype, quantization = 2, "float32", None

        class connection:  # noqa: N801
            reports = (make_report(0), make_report(1))

    return Deployment


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((ROOT / "deploy/grafana/moe_runtime.json").read_text())


def _expressions(dashboard: dict[str, Any]) -> list[str]:
    of_panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return of_panels + [v["definition"] for v in dashboard["templating"]["list"] if "definition" in v]


def _selectors(expression: str) -> list[tuple[str, set[str]]]:
    """Names of metrics in an expression, and of the labels that each is selected by."""
    found = re.findall(r"(moe_runtime:\w+)(?:\{([^}]*)\})?", expression)
    return [(name, set(re.findall(r"(\w+)=", labels))) for name, labels in found]


def test_every_expression_names_exported_series_and_labels_that_they_have(
    families: list[Metric], dashboard: dict[str, Any]
) -> None:
    labels = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    for expression in _expressions(dashboard):
        assert _selectors(expression), expression
        for name, selected in _selectors(expression):
            assert name in labels, expression
            assert selected <= labels[name], expression


def test_labels_by_which_an_expression_groups_or_that_a_legend_shows_exist(
    families: list[Metric], dashboard: dict[str, Any]
) -> None:
    labels = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            for group in re.findall(r"by \(([^)]*)\)", target["expr"]):
                wanted.update(part.strip() for part in group.split(","))
            for name, _ in _selectors(target["expr"]):
                assert wanted <= labels[name], target


def test_every_exported_family_is_in_the_dashboard(families: list[Metric], dashboard: dict[str, Any]) -> None:
    shown = {name for expression in _expressions(dashboard) for name, _ in _selectors(expression)}
    missing = [
        family.name
        for family in families
        if not shown & {family.name + suffix for suffix in _SUFFIXES[family.type]}
    ]
    assert missing == []


def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_the_documentation_has_a_row_for_every_family_with_its_labels(families: list[Metric]) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+),[^|]*\| ([^|]*)\|", (ROOT / "docs/metrics.md").read_text(), re.M)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    documented["expert_tokens_total"][1].remove("expert")  # where it was asked for
    exported = {}
    for family in families:
        name = family.name.removeprefix("moe_runtime:") + ("_total" if family.type == "counter" else "")
        labels = {key for sample in family.samples for key in sample.labels} - {"model_name", "le"}
        exported[name] = (family.type, labels)
    assert documented == exported
