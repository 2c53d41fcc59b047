"""ForCache: what a layer makes for the cache that it is called with, kept until it is called with another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Cache = TypeVar("Cache")
Made = TypeVar("Made")


class ForCache(Generic[Cache, Made]):
    """One thing at a time: caches live as long as a rank serves, and only tests and warm-ups have several."""

    def __init__(self) -> None:
        self._kept: tuple[Cache, Made] | None = None

    def get(self, cache: Cache, make: Callable[[], Made]) -> Made:
        """What `make` gave for this cache (the object, not one that equals it)."""
        if self._kept is None or self._kept[0] is not cache:
            self._kept = cache, make()
        return self._kept[1]
