"""FakeRank: a model whose caches hold what they stand for, so that every wrong read shows.

A KV cell holds the hash of all tokens up to its own, a state slot the hash of all tokens that it summarises,
and the next token is a function of the hash of everything before it.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_runtime.cache.blocks import BlockAllocator
from moe_runtime.cache.prefix import Node, PrefixTree
from moe_runtime.cache.slots import SlotAllocator
from moe_runtime.request import EngineRequest, SamplingParams
from moe_runtime.scheduler import ScheduledEntry, ScheduledStep, Scheduler, SchedulerConfig, Sequence

BLOCK = 4


def prefix_hashes(tokens: list[int]) -> list[int]:
    """Hash of the first 0, 1, ... tokens."""
    hashes = [0]
    for token in tokens:
        hashes.append(hash((hashes[-1], token)))
    return hashes


def next_token(tokens: list[int]) -> int:
    """What the fake model says after `tokens`: 1 to 7."""
    return 1 + prefix_hashes(tokens)[-1] % 7


def expected_output(request: EngineRequest, max_tokens: int) -> list[int]:
    """What a request gives alone: up to `max_tokens` tokens in all, or a stop token."""
    tokens = list(request.prompt_token_ids)
    while len(tokens) < max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in (request.params.stop_token_ids or ()):
            break
    return tokens[len(request.prompt_token_ids) :]


def make_request(
    name: str,
    prompt: list[int],
    max_tokens: int | None = 4,
    *,
    sample: int = 0,
    priority: int = 0,
    **params: object,
) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        sample_index=sample,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        seed=1,
        priority=priority,
    )


class FakeRank:
    """A scheduler, its allocators, and a model that checks every read and write."""

    def __init__(
        self, *, blocks: int = 100, slots: int = 8, has_state: bool = True, **config: object
    ) -> None:
        limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 200, **config}
        limits.setdefault("state_checkpoint_interval", 8)
        self.blocks, self.slots = BlockAllocator(blocks + 1, BLOCK), SlotAllocator(slots + 1)
        self.scheduler = Scheduler(
            SchedulerConfig(block_size=BLOCK, has_state=has_state, **limits),  # type: ignore[arg-type]
            self.blocks,
            self.slots,
        )
        self.has_state = has_state
        self.kv: dict[tuple[int, int], int] = {}
        self.states: dict[int, int] = {}
        self.num_computed_tokens = 0  # of all steps
        self.sequences: list[Sequence] = []

    @property
    def tree(self) -> PrefixTree:
        return self.scheduler._memory.tree

    def add(self, name: str, prompt: list[int], max_tokens: int | None = 4, **rest: object) -> Sequence:
        sequence = self.scheduler.add(make_request(name, prompt, max_tokens, **rest))  # type: ignore[arg-type]
        self.sequences.append(sequence)
        return sequence

    def run(self, step: ScheduledStep) -> list[int]:
        """The step's tokens, after checking that all it reads is its own past and all it writes its own."""
        states = {to: self.states[source] for source, to in step.state_copies}
        cells = {
            (to, offset): self.kv[source, offset]
            for source, to in step.block_copies
            for offset in range(BLOCK)
            if (source, offset) in self.kv
        }
        assert len(states) == len(step.state_copies), "a state slot is copied to twice"
        assert len({to for _, to in step.block_copies}) == len(step.block_copies)
        self.states.update(states)
        self.kv.update(cells)
        written: set[tuple[int, int]] = set()
        slots = [e.sequence.state_slot for e in step.entries]
        slots += [slot for e in step.entries for _, slot in e.checkpoints]
        assert 0 not in slots
        assert len(set(slots)) == len(slots), "a state slot is written twice"
        for entry in step.entries:
            self._write(entry, written)
        for entry in step.entries:
            self._check_reads(entry)
        self.num_computed_tokens += step.num_tokens
        return [next_token(sequence.token_ids) for sequence in step.sampled]

    def _write(self, entry: ScheduledEntry, written: set[tuple[int, int]]) -> None:
        sequence, end = entry.sequence, entry.start + entry.num_tokens
        hashes = prefix_hashes(sequence.token_ids)
        shared = {node.block for node in self.nodes()}
        for position in range(max(entry.start, entry.kv_from), end):
            cell = (sequence.block_table[position // BLOCK], position % BLOCK)
            assert cell not in written, "a KV cell is written twice"
            assert cell[0] not in shared, "a cached block is written"
            written.add(cell)
            self.kv[cell] = hashes[position + 1]
        if self.has_state:
            if entry.start:
                assert self.states[sequence.state_slot] == hashes[entry.start], (
                    "the state is another prefix's"
                )
            self.states[sequence.state_slot] = hashes[end]
            for num_tokens, slot in entry.checkpoints:
                self.states[slot] = hashes[entry.start + num_tokens]

    def _check_reads(self, entry: ScheduledEntry) -> None:
        sequence = entry.sequence
        hashes = prefix_hashes(sequence.token_ids)
        for position in range(entry.start + entry.num_tokens):
            cell = (sequence.block_table[position // BLOCK], position % BLOCK)
            assert self.kv[cell] == hashes[position + 1], f"position {position} is not its own"

    def step(self, during: Callable[[], None] | None = None) -> ScheduledStep:
        """One whole step; `during` runs between its forward pass and its update."""
        step = self.scheduler.schedule()
        tokens = self.run(step)
        if during is not None:
            during()
        self.scheduler.update(step, tokens)
        self.check()
        return step

    def finish_all(self, limit: int = 10_000) -> int:
        """Run until nothing is left; returns the tokens that this computed."""
        before = self.num_computed_tokens
        for _ in range(limit):
            if not self.scheduler.has_work:
                return self.num_computed_tokens - before
            assert self.step().num_tokens, "a step did nothing"
        raise AssertionError(f"not finished after {limit} steps")

    def nodes(self) -> list[Node]:
        """Every node of the tree."""
        found, todo = [], [self.tree.root]
        while todo:
            node = todo.pop()
            below = [*node.children.values(), *node.tails.values()]
            found += below
            todo += below
        return found

    def check(self) -> None:
        """Every block and slot is free, one sequence's or one node's; counts of users are right."""
        nodes = self.nodes()
        held = [node.block for node in nodes]
        reserved = self.tree._reserved  # while a step is in flight
        slots = [*reserved, *(node.slot for node in nodes if node.slot)]
        users: dict[Node, int] = dict.fromkeys(nodes, 0)
        for s in self.sequences:
            assert [node.block for node in s.path] == s.block_table[: len(s.path)]
            held += s.block_table[len(s.path) :]
            slots += [s.state_slot] if s.state_slot else []
            for node in s.path:
                users[node] += 1
        assert 0 not in held
        assert len(set(held)) == len(held) == self.blocks.num_used, "a block is lost or held twice"
        assert len(set(slots)) == len(slots) == self.slots.num_used, "a slot is lost or held twice"
        assert users == {node: node.num_users for node in nodes}
        stats = self.scheduler.stats
        assert stats.blocks_used + stats.blocks_cached == self.blocks.num_used
        assert stats.slots_used + stats.slots_cached == self.slots.num_used
        assert stats.blocks_cached == sum(not count for count in users.values())
        for node in nodes:
            assert node.num_users <= (node.parent.num_users if node.parent.parent else 1 << 30)
            if node.slot:
                hashes = prefix_hashes(self._tokens(node))
                assert self.states[node.slot] == hashes[-1], "a checkpoint is another prefix's"
            else:
                assert len(node.tokens) == BLOCK, "a tail without a state"

    @staticmethod
    def _tokens(node: Node) -> list[int]:
        parts = []
        while node.parent is not None:
            parts.append(node.tokens)
            node = node.parent
        return [token for part in reversed(parts) for token in part]
