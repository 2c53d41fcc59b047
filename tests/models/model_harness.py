"""A one-process runner for model tests: loads a weight map, keeps caches full of NaN, packs batches."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from moe_kernels.select import KernelPlan
from moe_models.batch import ForwardBatch
from moe_models.interfaces import (
    ExpertShard,
    KVCache,
    KVCacheSpec,
    LayerCache,
    LayerCacheSpec,
    StateCache,
    TokenDispatcher,
)
from moe_models.local_dispatch import LocalDispatcher
from moe_models.qwen3_next import Qwen3NextForCausalLM

BLOCK_SIZE = 4
NUM_BLOCKS = 96
NUM_SLOTS = 9


def load_model(
    path: str | Path, shard: ExpertShard | None = None, dtype: torch.dtype = torch.float32
) -> Qwen3NextForCausalLM:
    """The model of a single-file checkpoint; every parameter starts as NaN, so one not loaded shows."""
    config = json.loads((Path(path) / "config.json").read_text())
    shard = shard or ExpertShard.whole(config["num_experts"])
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Qwen3NextForCausalLM(config, shard, KernelPlan.reference())
    finally:
        torch.set_default_dtype(previous)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.fill_(torch.nan)
    with safe_open(Path(path) / "model.safetensors", "pt") as file:
        names = set(file.keys())
        weights = model.weight_map(names.__contains__)
        assert set(weights.expected) == names
        assert all(tuple(file.get_slice(n).get_shape()) == shape for n, shape in weights.expected.items())
        for load in weights.loads:
            value = file.get_slice(load.source)[load.source_index or ...]
            if load.source_rows is not None:
                value = value[load.source_rows]
            parameters[load.target][load.target_index or ...] = value.to(parameters[load.target].dtype)
    assert not [name for name, parameter in parameters.items() if parameter.isnan().any()]
    return model


@dataclass
class CachedSequence:
    """One sequence in the caches."""

    slot: int
    length: int = 0
    blocks: list[int] = field(default_factory=list)


class Harness:
    """One rank's caches and sequences. Blocks and slots are handed out in random order."""

    def __init__(
        self, model: Qwen3NextForCausalLM, dispatcher: TokenDispatcher | None = None, seed: int = 0
    ) -> None:
        self.model = model
        self.dispatcher = dispatcher or LocalDispatcher(ExpertShard.whole(model.config.num_experts))
        order = random.Random(seed)
        self.free_blocks = order.sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1)
        self.free_slots = order.sample(range(NUM_SLOTS), NUM_SLOTS)
        self.sequences: dict[str, CachedSequence] = {}
        self.caches = tuple(_nan_cache(spec) for spec in model.cache_specs())

    def step(self, tokens: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """Run each sequence's next tokens in one packed batch: float32 log-probabilities [tokens, V] of each.

        A name seen for the first time is a new sequence. No sequence at all is a step without tokens.
        """
        for name in tokens:
            if name not in self.sequences:
                self.sequences[name] = CachedSequence(self.free_slots.pop())
        names = sorted(tokens, key=lambda n: not self._is_decode(n, tokens[n]))
        batch = self._batch(names, tokens)
        with torch.inference_mode():
            hidden_TH = self.model(batch, self.caches, self.dispatcher)
            logprobs_TV = self.model.compute_logits(hidden_TH).float().log_softmax(-1)
        for name in names:
            self.sequences[name].length += len(tokens[name])
        return dict(zip(names, logprobs_TV.split(list(batch.query_lens)), strict=True))

    def finish(self, name: str) -> None:
        """Give a sequence's blocks and slot back, contents and all."""
        done = self.sequences.pop(name)
        self.free_blocks += done.blocks
        self.free_slots.append(done.slot)

    def _is_decode(self, name: str, tokens: Sequence[int]) -> bool:
        return len(tokens) == 1 and self.sequences[name].length > 0

    def _batch(self, names: list[str], tokens: Mapping[str, Sequence[int]]) -> ForwardBatch:
        query_lens = tuple(len(tokens[name]) for name in names)
        context_lens = tuple(self.sequences[name].length for name in names)
        positions: list[int] = []
        kv_slots: list[int] = []
        for name, count, context in zip(names, query_lens, context_lens, strict=True):
            blocks = self.sequences[name].blocks
            while len(blocks) * BLOCK_SIZE < context + count:
                blocks.append(self.free_blocks.pop())
            span = range(context, context + count)
            positions += span
            kv_slots += [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in span]
        width = max((len(self.sequences[name].blocks) for name in names), default=0)
        tables = [self.sequences[n].blocks + [0] * (width - len(self.sequences[n].blocks)) for n in names]
        ids = [token for name in names for token in tokens[name]]
        starts = torch.tensor([0, *query_lens]).cumsum(0)
        return ForwardBatch(
            token_ids_T=torch.tensor(ids, dtype=torch.int64),
            positions_T=torch.tensor(positions, dtype=torch.int64),
            cu_seqlens=starts.to(torch.int32),
            context_lens_B=torch.tensor(context_lens, dtype=torch.int32),
            block_tables_BM=torch.tensor(tables, dtype=torch.int32).view(len(names), width),
            kv_slots_T=torch.tensor(kv_slots, dtype=torch.int64),
            state_slots_B=torch.tensor([self.sequences[n].slot for n in names], dtype=torch.int64),
            query_lens=query_lens,
            context_lens=context_lens,
            num_decodes=sum(self._is_decode(name, tokens[name]) for name in names),
        )


def _nan_cache(spec: LayerCacheSpec) -> LayerCache:
    if isinstance(spec, KVCacheSpec):
        shape = (NUM_BLOCKS, BLOCK_SIZE, spec.num_kv_heads, spec.head_size)
        return KVCache(*(torch.full(shape, torch.nan, dtype=spec.dtype) for _ in range(2)))
    conv = torch.full((NUM_SLOTS, spec.conv_channels, spec.conv_width), torch.nan, dtype=spec.conv_dtype)
    shape = (NUM_SLOTS, spec.num_heads, spec.key_size, spec.value_size)
    return StateCache(conv, torch.full(shape, torch.nan, dtype=spec.state_dtype))
