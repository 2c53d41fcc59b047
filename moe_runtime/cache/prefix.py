"""PrefixTree: KV blocks and states that sequences have computed, found again by the tokens that they hold.

Every node is a KV block that continues its parent's tokens. A full block is found by its exact tokens; a *tail*
is a partly filled block at the end of what one sequence computed. A node may hold a *checkpoint*: a state slot
with the DeltaNet and convolution state exactly after its last token. Nodes that no running sequence uses, and
checkpoints, are given up least recently used first when blocks or slots run out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.cache.slots import SlotAllocator

Tokens = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Node:
    """One block of cached tokens; only the tree writes to it."""

    parent: Node | None  # None: the root, which holds no tokens
    tokens: Tokens  # what the block holds; as many as fit, or fewer in a tail
    block: int
    num_users: int = 0  # running sequences that read the block; a tail is copied and has none
    slot: int = 0  # state after the last token; 0: no checkpoint here
    children: dict[Tokens, Node] = field(default_factory=dict)  # full blocks
    tails: dict[Tokens, Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Match:
    """What the tree holds of a sequence's beginning."""

    path: list[Node]  # full blocks, in order
    num_tokens: int = 0  # tokens that need not be computed again
    source: Node | None = (
        None  # whose checkpoint holds the state after `num_tokens`; None: state is not needed
    )


class PrefixTree:
    """The tree and, behind it, the allocators: who needs a block or a slot asks here, so that caches make way.

    A node is released after its descendants, so the least recently used node that nobody uses is a leaf.
    """

    def __init__(
        self, blocks: BlockAllocator, slots: SlotAllocator, *, has_state: bool, max_checkpoints: int
    ) -> None:
        """`has_state`: a hit needs a checkpoint; without it, full blocks are enough and no tails are kept."""
        self.root = Node(None, (), 0)
        self.num_block_evictions = 0
        self.num_checkpoint_evictions = 0
        self._blocks = blocks
        self._slots = slots
        self._block_size = blocks.block_size
        self._has_state = has_state
        self._max_checkpoints = max_checkpoints if has_state else 0
        self._unused: OrderedDict[Node, None] = (
            OrderedDict()
        )  # nodes without users, least recently used first
        self._checkpoints: OrderedDict[Node, None] = OrderedDict()  # nodes with a slot, in the same order
        self._reserved: set[int] = set()  # slots that the step in flight writes checkpoints to

    # ----------------------------------------------------------------- looking up

    def match(self, tokens: Sequence[int], limit: int) -> Match:
        """The longest beginning of `tokens` that is cached, of at most `limit` tokens to skip.

        `path` may reach further than `num_tokens`: those blocks are there, the state to go on from is not.
        """
        path: list[Node] = []
        node, size = self.root, self._block_size
        for end in range(size, limit + 1, size):
            child = node.children.get(tuple(tokens[end - size : end]))
            if child is None:
                break
            path.append(child)
            node = child
        if not self._has_state:
            return Match(path, len(path) * size)
        for depth in range(len(path), -1, -1):
            node = path[depth - 1] if depth else self.root
            tail = self._longest_tail(node, tokens[depth * size : min(limit, (depth + 1) * size)])
            if tail is not None:
                return Match(path, depth * size + len(tail.tokens), tail)
            if node.slot:
                return Match(path, depth * size, node)
        return Match(path)

    def _longest_tail(self, node: Node, tokens: Sequence[int]) -> Node | None:
        if not node.tails:
            return None
        wanted = tuple(tokens)
        found = (node.tails.get(wanted[:length]) for length in range(len(wanted), 0, -1))
        return next((tail for tail in found if tail is not None), None)

    def touch(self, source: Node) -> None:
        """A checkpoint was used last. The blocks above it are pinned, so among the unused only a tail moves."""
        self._checkpoints.move_to_end(source)
        if source in self._unused:
            self._unused.move_to_end(source)

    # ----------------------------------------------------------------- users

    def pin(self, path: Iterable[Node]) -> None:
        """A running sequence reads these blocks: they stay."""
        for node in path:
            if not node.num_users:
                del self._unused[node]
            node.num_users += 1

    def unpin(self, path: list[Node]) -> None:
        """A sequence stops reading these blocks; they were used last, the deepest before its parents."""
        for node in reversed(path):
            node.num_users -= 1
            assert node.num_users >= 0, "a block is released twice"
            if not node.num_users:
                self._unused[node] = None

    # ----------------------------------------------------------------- growing

    def insert(self, parent: Node, tokens: Tokens, block: int) -> Node:
        """The pinned child of `parent` that holds `tokens`: a new one with `block`, or the one that is there.

        In the second case `block` holds the same tokens and becomes free.
        """
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = Node(parent, tokens, block, num_users=1)
            return node
        self.pin((node,))
        self._blocks.free((block,))
        return node

    def add_tail(self, parent: Node, tokens: Tokens, block: int, slot: int) -> None:
        """Keep a partly filled block and the state after it; both become the tree's."""
        known = parent.tails.get(tokens)
        if known is not None:
            self.touch(known)
        if known is not None or not self._make_room_for_checkpoint():
            self._blocks.free((block,))
            self._slots.free(slot)
            return
        tail = parent.tails[tokens] = Node(parent, tokens, block, slot=slot)
        self._unused[tail] = None
        self._checkpoints[tail] = None

    def attach(self, node: Node, slot: int) -> None:
        """Keep the state after `node`, unless one is there; the slot becomes the tree's."""
        self._reserved.discard(slot)
        if node.slot:
            self._checkpoints.move_to_end(node)
        if node.slot or not self._make_room_for_checkpoint():
            self._slots.free(slot)
            return
        node.slot = slot
        self._checkpoints[node] = None

    def _make_room_for_checkpoint(self) -> bool:
        if self.num_checkpoints < self._max_checkpoints:
            return True
        return self._evict_checkpoint()

    # ----------------------------------------------------------------- blocks and slots

    @property
    def num_available_blocks(self) -> int:
        """Blocks that `take_blocks` can give, out of the free ones and the unused nodes."""
        return self._blocks.num_free + len(self._unused)

    @property
    def num_unused_blocks(self) -> int:
        """Blocks that are cached and that no running sequence reads."""
        return len(self._unused)

    @property
    def num_checkpoints(self) -> int:
        """Slots that hold checkpoints or are reserved for them."""
        return len(self._checkpoints) + len(self._reserved)

    @property
    def has_available_slot(self) -> bool:
        """Whether `take_slot` can give one, free or a checkpoint's."""
        return bool(self._slots.num_free or self._checkpoints)

    def take_blocks(self, count: int) -> list[int]:
        """`count` blocks; the caller has asked `num_available_blocks`."""
        while self._blocks.num_free < count:
            self._remove(next(iter(self._unused)))
        return self._blocks.allocate(count)

    def free_blocks(self, block_ids: Iterable[int]) -> None:
        """Give back blocks that are in no node."""
        self._blocks.free(block_ids)

    def free_slot(self, slot: int) -> None:
        """Give back a running sequence's slot."""
        self._slots.free(slot)

    def take_slot(self) -> int:
        """A slot for a running sequence; the caller has asked `has_available_slot`."""
        if not self._slots.num_free:
            self._evict_checkpoint()
        return self._slots.allocate()

    def reserve_checkpoint(self) -> int:
        """A slot that the next step writes a checkpoint to, or 0; `attach` or `give_up` must follow."""
        within_budget = self.num_checkpoints < self._max_checkpoints
        if not (within_budget and self._slots.num_free) and not self._evict_checkpoint():
            return 0
        slot = self._slots.allocate()
        self._reserved.add(slot)
        return slot

    def give_up(self, slot: int) -> None:
        """A reserved slot is not needed after all."""
        self._reserved.remove(slot)
        self._slots.free(slot)

    def _evict_checkpoint(self) -> bool:
        """Free the slot of the least recently used checkpoint; False if there is none."""
        if not self._checkpoints:
            return False
        node = next(iter(self._checkpoints))
        if len(node.tokens) < self._block_size:
            self._remove(node)  # a tail is of no use without its state
        else:
            self._drop_checkpoint(node)
        return True

    def _drop_checkpoint(self, node: Node) -> None:
        del self._checkpoints[node]
        self._slots.free(node.slot)
        node.slot = 0
        self.num_checkpoint_evictions += 1

    def _remove(self, node: Node) -> None:
        """Forget an unused leaf, with its block and its checkpoint."""
        assert not node.num_users, "a block in use cannot go"
        assert not node.children, "only a leaf can go"
        assert not node.tails, "only a leaf can go"
        assert node.parent is not None, "the root stays"
        del self._unused[node]
        is_tail = len(node.tokens) < self._block_size
        del (node.parent.tails if is_tail else node.parent.children)[node.tokens]
        self._blocks.free((node.block,))
        self.num_block_evictions += 1
        if node.slot:
            self._drop_checkpoint(node)
