"""BlockAllocator: which of a rank's KV blocks are free."""

from __future__ import annotations

from collections.abc import Iterable

from moe_runtime.cache.free_list import FreeList


class BlockAllocator:
    """Hands out paged KV blocks of `block_size` tokens; one block id is valid in every full-attention layer.

    Block 0 is never handed out, so that block tables can be padded with 0: whatever is read or written
    there belongs to no sequence. `num_blocks` counts it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert block_size >= 1, f"block_size must be at least 1, got {block_size}"
        self.block_size = block_size
        self._ids = FreeList(num_blocks)

    @property
    def capacity(self) -> int:
        """Blocks that can be handed out at all."""
        return self._ids.size - 1

    @property
    def num_free(self) -> int:
        return self._ids.num_free

    @property
    def num_used(self) -> int:
        return self._ids.num_taken

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, count: int) -> bool:
        return count <= self._ids.num_free

    def allocate(self, count: int) -> list[int]:
        """`count` block ids; the caller has asked `can_allocate`."""
        return self._ids.take(count)

    def free(self, block_ids: Iterable[int]) -> None:
        """Give blocks back; freeing one that is not in use is a bug and fails an assertion."""
        self._ids.give_back(block_ids)
