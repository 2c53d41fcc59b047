"""SlotAllocator: which of a rank's DeltaNet and convolution state slots are free."""

from __future__ import annotations

from moe_runtime.cache.free_list import FreeList


class SlotAllocator:
    """Hands out state slots, one a running sequence; a slot id is valid in every linear-attention layer.

    Slot 0 is never handed out, so that padded entries can point at it. `num_slots` counts it.
    """

    def __init__(self, num_slots: int) -> None:
        self._ids = FreeList(num_slots)

    @property
    def capacity(self) -> int:
        """Slots that can be handed out at all."""
        return self._ids.size - 1

    @property
    def num_free(self) -> int:
        return self._ids.num_free

    @property
    def num_used(self) -> int:
        return self._ids.num_taken

    def allocate(self) -> int:
        """A slot id; the caller has checked `num_free`."""
        return self._ids.take(1)[0]

    def free(self, slot: int) -> None:
        """Give a slot back; freeing one that is not in use is a bug and fails an assertion."""
        self._ids.give_back((slot,))
