"""A one-process runner for model tests: loads a weight map, keeps caches full of NaN, packs batches."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

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
    path: str | Path,
    shard: ExpertShard | None = None,
    dtype: torch.dtype = torch.float32,
    plan: KernelPlan | None = None,
    device: str = "cpu",
) -> Qwen3NextForCausalLM:
    """The model of a single-file checkpoint; every parameter starts as NaN, so one not loaded shows."""
    config = json.loads((Path(path) / "config.json").read_text())
    shard = shard or ExpertShard.whole(config["num_experts"])
    model = build_model(config, shard, dtype, plan or KernelPlan.reference(), device)
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
            parameters[load.target][load.target_index or ...] = value.to(parameters[load.target])
    assert not [name for name, parameter in parameters.items() if parameter.isnan().any()]
    return model


def build_model(
    config: Mapping[str, Any], shard: ExpertShard, dtype: torch.dtype, plan: KernelPlan, device: str
) -> Qwen3NextForCausalLM:
    """The model with uninitialised parameters."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen3NextForCausalLM(config, shard, plan)
    finally:
        torch.set_default_dtype(previous)


@dataclass
class CachedSequence:
    """One sequence in the caches."""

    slot: int
    length: int = 0
    blocks: list[int] = field(default_factory=list)


class Harness:
    """One rank's caches and sequences. Blocks and slots are handed out in random order."""

    def __init__(
        self,
        model: Qwen3NextForCausalLM,
        dispatcher: TokenDispatcher | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.model = model
        self.device = device
        self.dispatcher = dispatcher or LocalDispatcher(ExpertShard.whole(model.config.num_experts), device)
        order = random.Random(seed)
        self.free_blocks = order.sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1)
        self.free_slots = order.sample(range(NUM_SLOTS), NUM_SLOTS)
        self.sequences: dict[str, CachedSequence] = {}
        self.caches = tuple(_nan_cache(spec, device) for spec in model.cache_specs())

    def step(self, tokens: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        """Run each sequence's next tokens in one packed batch: float32 log-probabilities [tokens, V] of each.

        A name seen for the first time is a new sequence. No sequence at all is a step without tokens.
        """
        names = self._in_order(tokens)
        batch = self.batch(tokens)
        logprobs_TV = self.forward(batch)
        return dict(zip(names, logprobs_TV.split(list(batch.query_lens)), strict=True))

    def batch(self, tokens: Mapping[str, Sequence[int]]) -> ForwardBatch:
        """Each sequence's next tokens; the sequences are then longer by these."""
        names = self._in_order(tokens)
        batch = self._batch(names, tokens)
        for name in names:
            self.sequences[name].length += len(tokens[name])
        return batch

    def _in_order(self, tokens: Mapping[str, Sequence[int]]) -> list[str]:
        """Decodes first."""
        for name in tokens:
            if name not in self.sequences:
                self.sequences[name] = CachedSequence(self.free_slots.pop())
        return sorted(tokens, key=lambda n: not self._is_decode(n, tokens[n]))

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """float32 log-probabilities [T, V]; all work of a step that is the device's alone."""
        with torch.inference_mode():
            hidden_TH = self.model(batch, self.caches, self.dispatcher)
            return self.model.compute_logits(hidden_TH).float().log_softmax(-1)

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
        return ForwardBatch(
            token_ids_T=self._tensor(ids),
            positions_T=self._tensor(positions),
            cu_seqlens=self._tensor([0, *accumulate(query_lens)], torch.int32),
            context_lens_B=self._tensor(context_lens, torch.int32),
            block_tables_BM=self._tensor(tables, torch.int32).view(len(names), width),
            kv_slots_T=self._tensor(kv_slots),
            state_slots_B=self._tensor([self.sequences[n].slot for n in names]),
            query_lens=query_lens,
            context_lens=context_lens,
            num_decodes=sum(self._is_decode(name, tokens[name]) for name in names),
        )

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def _nan_cache(spec: LayerCacheSpec, device: str) -> LayerCache:
    def nan(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    if isinstance(spec, KVCacheSpec):
        shape = (NUM_BLOCKS, BLOCK_SIZE, spec.num_kv_heads, spec.head_size)
        return KVCache(nan(*shape, dtype=spec.dtype), nan(*shape, dtype=spec.dtype))
    conv = nan(NUM_SLOTS, spec.conv_channels, spec.conv_width, dtype=spec.conv_dtype)
    state = nan(NUM_SLOTS, spec.num_heads, spec.key_size, spec.value_size, dtype=spec.state_dtype)
    return StateCache(conv, state)
