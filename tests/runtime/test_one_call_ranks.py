"""Layers in one call whose experts are on several ranks: what they give layer by layer, and on one rank alone."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from moe_kernels.select import KernelPlan
from moe_models.interfaces import Dispatched, ExpertShard, TokenDispatcher, one_call_of
from moe_models.qwen3_next import Qwen3NextForCausalLM
from moe_runtime.errors import PeerLostError
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.parallel import shared_memory
from moe_runtime.parallel.capacity import StepCapacity
from moe_runtime.parallel.dispatch import ExpertLoad
from moe_runtime.parallel.host_link import HostLink
from moe_runtime.parallel.shared_memory import SharedMemoryDispatcher
from tests.checkpoints import make_variant
from tests.kernels.implementations import NATIVE
from tests.models.model_harness import Harness, load_model
from tests.runtime.host_ranks import check_survivors, run

pytestmark = pytest.mark.skipif(not NATIVE, reason="there is no compiled library for this machine")

# Tokens of each sequence in each step, by rank: prompts, chunks beside decodes, ranks without tokens, decodes alone.
STEPS = [
    ({"a": 23}, {}, {"a": 2, "b": 1}),
    ({"a": 1, "b": 9}, {"a": 40}, {"a": 1}),
    ({"a": 1, "b": 1}, {"a": 1}, {"a": 1, "b": 1}),
    ({}, {}, {"a": 1}),
    ({"b": 1}, {"a": 1, "b": 3}, {}),
]
MAX_TOKENS = 48
LOST = 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_variant(path, "base")
    return path


class LayerByLayer:
    """Wants to be asked at every layer."""

    def __init__(self, inner: TokenDispatcher) -> None:
        self._inner = inner

    def dispatch(self, *args: torch.Tensor) -> Dispatched:
        return self._inner.dispatch(*args)

    def combine(self, y_GH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        return self._inner.combine(y_GH, dispatched)


class Rank:
    """The model with this rank's experts, and its sequences."""

    def __init__(self, link: HostLink, model: Qwen3NextForCausalLM, placement: ExpertPlacement) -> None:
        self.harness = Harness(model, seed=link.rank)
        num_local = len(placement.experts_of_rank[link.rank])
        self.load = ExpertLoad(len(model.config.sparse_layers), num_local, torch.device("cpu"))

    def step(self, dispatcher: TokenDispatcher, tokens: dict[str, list[int]]) -> torch.Tensor:
        """Log-probabilities [T, V]."""
        self.harness.dispatcher = dispatcher
        found = self.harness.step(tokens)
        return torch.cat([found[name] for name in sorted(found)]) if found else torch.zeros(0)


def _tokens(rank: int, step: int) -> dict[str, list[int]]:
    order = random.Random(f"{rank} {step}")
    return {name: order.choices(range(1, 199), k=count) for name, count in STEPS[step][rank].items()}


def _model(
    checkpoint: str, placement: ExpertPlacement, rank: int, dtype: torch.dtype, implementation: str
) -> Qwen3NextForCausalLM:
    shard = ExpertShard(placement.num_experts, tuple(placement.experts_of_rank[rank]))
    return load_model(checkpoint, shard, dtype, KernelPlan.uniform(implementation, "tested"))


def _dispatchers(
    link: HostLink, model: Qwen3NextForCausalLM, placement: ExpertPlacement
) -> SharedMemoryDispatcher:
    config = model.config
    capacity = StepCapacity(
        max_tokens=MAX_TOKENS,
        hidden_size=config.hidden_size,
        top_k=config.num_experts_per_tok,
        dtype=model.embed_tokens.weight.dtype,
    )
    return SharedMemoryDispatcher(link, placement, capacity)


def _serve(
    link: HostLink, checkpoint: str, implementation: str, dtype_name: str, num_experts: int, in_chunks: bool
) -> list[list[float]]:
    """What all steps gave, after checks that it does not matter which ranks go layer by layer."""
    if in_chunks:
        shared_memory._PARTS_BYTES = 0  # the smallest chunks of partial sums
    placement = ExpertPlacement.contiguous(num_experts, link.size)
    model = _model(checkpoint, placement, link.rank, getattr(torch, dtype_name), implementation)
    made = _dispatchers(link, model, placement)
    assert (made.layout.chunk_tokens < MAX_TOKENS) == in_chunks
    in_one_call, by_layer, mixed = (Rank(link, model, placement) for _ in range(3))
    everything = []
    for index in range(len(STEPS)):
        tokens = _tokens(link.rank, index)
        counts = tuple(sum(STEPS[index][rank].values()) for rank in range(link.size))
        found = []
        for rank, hides in ((in_one_call, False), (by_layer, True), (mixed, link.rank == 0)):
            dispatcher = rank.load.watch(made.for_step(counts))
            assert one_call_of(dispatcher) is not None
            found.append(rank.step(LayerByLayer(dispatcher) if hides else dispatcher, tokens))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
        everything.append(found[0].flatten().tolist())
    loads = [rank.load.tokens_per_expert() for rank in (in_one_call, by_layer, mixed)]
    assert loads[0].sum() > 0
    assert torch.equal(loads[0], loads[1])
    assert torch.equal(loads[0], loads[2])
    return everything


@pytest.mark.parametrize(("size", "in_chunks"), [(2, False), (3, True)])
def test_ranks_give_what_they_give_layer_by_layer_and_what_one_gives_alone(
    size: int, in_chunks: bool, checkpoint: Path, tmp_path: Path
) -> None:
    implementation = NATIVE[-1]
    whole = load_model(checkpoint, plan=KernelPlan.uniform(implementation, "tested"))
    num_experts = whole.config.num_experts
    found = run(_serve, size, tmp_path, str(checkpoint), implementation, "float32", num_experts, in_chunks)
    for rank, steps in enumerate(found):
        alone = Harness(whole, seed=7)
        for index, logprobs in enumerate(steps):
            wanted = alone.step(_tokens(rank, index))
            expected = torch.cat([wanted[n] for n in sorted(wanted)]) if wanted else torch.zeros(0)
            given = torch.tensor(logprobs).view(expected.shape)
            torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)


def test_bfloat16_ranks_give_what_they_give_layer_by_layer(checkpoint: Path, tmp_path: Path) -> None:
    # Not compared with one rank alone: partial sums are rounded, and a router may then choose other experts.
    num_experts = load_model(checkpoint).config.num_experts
    run(_serve, 2, tmp_path, str(checkpoint), NATIVE[0], "bfloat16", num_experts, False)


def _lose_a_peer(link: HostLink, checkpoint: str, num_experts: int) -> list[object]:
    placement = ExpertPlacement.contiguous(num_experts, link.size)
    model = _model(checkpoint, placement, link.rank, torch.float32, NATIVE[-1])
    made = _dispatchers(link, model, placement)
    rank = Rank(link, model, placement)
    tokens, counts = {"a": [5, 6, 7]}, (3,) * link.size
    link.agree([0])  # until all have their model
    if link.rank == LOST:
        x_TH = torch.ones(3, model.config.hidden_size)
        top_k = model.config.num_experts_per_tok
        ids_TK = torch.arange(top_k).expand(3, top_k)
        made.for_step(counts).dispatch(x_TH, ids_TK, torch.ones(3, top_k))
        os.kill(os.getpid(), signal.SIGKILL)
    start_s = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        rank.step(made.for_step(counts), tokens)
    with pytest.raises(PeerLostError, match="a step failed: rank"):
        rank.step(made.for_step(counts), tokens)
    return [time.monotonic() - start_s, str(caught.value)]


def test_survivors_of_a_killed_rank_leave_the_call(checkpoint: Path, tmp_path: Path) -> None:
    num_experts = load_model(checkpoint).config.num_experts
    check_survivors(_lose_a_peer, 3, LOST, tmp_path, str(checkpoint), num_experts)
