"""FreeList: which of a fixed range of ids are free; the common part of the block and slot allocators."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class FreeList:
    """Ids 1 to `size` - 1, each free or taken.

    Id 0 is never handed out: entries of block tables and slot lists that stand for nothing may hold 0, and
    what a kernel writes there belongs to nobody. The id freed longest ago is taken first.
    """

    def __init__(self, size: int) -> None:
        assert size >= 1, f"id 0 must exist, got size {size}"
        self.size = size
        self._free = deque(range(1, size))
        self._taken = bytearray(size)  # 1 where an id is in use

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_taken(self) -> int:
        return self.size - 1 - len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` ids; the caller has checked that so many are free."""
        assert 0 <= count <= len(self._free), f"{count} ids wanted, {len(self._free)} free"
        ids = [self._free.popleft() for _ in range(count)]
        for i in ids:
            assert not self._taken[i], f"id {i} is handed out twice"
            self._taken[i] = 1
        return ids

    def give_back(self, ids: Iterable[int]) -> None:
        """Make ids free again; each must be taken."""
        for i in ids:
            assert 0 < i < self.size, f"id {i} was never handed out"
            assert self._taken[i], f"id {i} is freed twice"
            self._taken[i] = 0
            self._free.append(i)
