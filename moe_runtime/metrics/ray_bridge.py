"""RayBridge: mirrors metrics into `ray.util.metrics`, which every Ray node exports."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import Metric
from prometheus_client.samples import Sample

_Key = tuple[str, tuple[tuple[str, str], ...]]


class RayBridge:
    """Belongs to one thread. Of histograms go sum and count: Ray's own take observations, not totals."""

    def __init__(self, collect: Callable[[], Iterable[Metric]], library: Any = None) -> None:
        """
        Args:
            collect: the families to mirror, as a registry collects them.
            library: what has `Gauge` and `Counter`; None: ray.util.metrics.
        """
        self._collect = collect
        self._library = library or importlib.import_module("ray.util.metrics")
        self._mirrors: dict[str, Any] = {}
        self._counted: dict[_Key, float] = {}

    def push(self) -> None:
        """Bring Ray's values up to date."""
        for family in self._collect():
            for sample in family.samples:
                if family.type == "gauge":
                    self._mirror(family.name, family, sample).set(sample.value, tags=sample.labels)
                elif family.type == "counter" and sample.name.endswith("_total"):
                    self._count(family.name, family, sample)
                elif family.type == "histogram" and sample.name.endswith(("_sum", "_count")):
                    self._count(sample.name, family, sample)

    def _mirror(self, name: str, family: Metric, sample: Sample) -> Any:
        mirror = self._mirrors.get(name)
        if mirror is None:
            kind = self._library.Gauge if family.type == "gauge" else self._library.Counter
            # Ray takes no colon in a name.
            mirror = kind(name.replace(":", "_"), family.documentation, tag_keys=tuple(sample.labels))
            self._mirrors[name] = mirror
        return mirror

    def _count(self, name: str, family: Metric, sample: Sample) -> None:
        key, value = (name, tuple(sample.labels.items())), sample.value
        mirror = self._mirror(name, family, sample)
        before = self._counted.get(key, 0.0)
        if value < before:  # the rank began anew
            before = 0.0
        if value > before:
            mirror.inc(value - before, tags=sample.labels)
        self._counted[key] = value
