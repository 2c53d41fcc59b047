"""What every rank of a dispatcher's test does: steps of tokens, weighted sums of all ranks' experts."""

from __future__ import annotations

import dataclasses

import torch

from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.parallel.capacity import StepCapacity
from moe_runtime.parallel.dispatch import ExpertLoad, make_dispatchers
from moe_runtime.parallel.groups import ProcessGroups
from moe_runtime.parallel.packing import TokenPacking

NUM_EXPERTS = 7  # divides by none of the rank counts
TOP_K = 3
HIDDEN = 5  # odd, so that packing has to align
CAPACITY = StepCapacity(max_tokens=9, hidden_size=HIDDEN, top_k=TOP_K, dtype=torch.float32)

# Tokens of each rank in one step; the first entries are used when there are fewer ranks.
TOKEN_COUNTS = [(4, 1, 6, 3), (0, 5, 0, 2), (1, 0, 0, 0), (0, 0, 9, 0)]


def _expert(x: torch.Tensor, expert: int) -> torch.Tensor:
    """A different affine map for each expert, so that the wrong expert shows."""
    return x * (expert + 2) - expert


def _reference(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x, dtype=torch.float64)
    for t in range(x.shape[0]):
        for expert, weight in zip(ids[t].tolist(), weights[t], strict=True):
            out[t] += _expert(x[t].double(), expert) * weight.double()
    return out


def _tokens(seed: int, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, HIDDEN, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(count)] or [])
    weights = torch.rand(count, TOP_K, generator=generator).to(dtype)
    return x, ids, weights


def _tokens_or_none(seed: int, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    if count:
        return _tokens(seed, count, dtype)
    return (
        torch.empty(0, HIDDEN, dtype=dtype),
        torch.empty(0, TOP_K, dtype=torch.int64),
        torch.empty(0, TOP_K, dtype=dtype),
    )


def check_steps(kind: str, groups: ProcessGroups, device: torch.device) -> None:
    """A rank's part in steps of a dispatcher, which must give what one rank with all experts gives."""
    rank, size = groups.rank, groups.size
    placement = ExpertPlacement.contiguous(NUM_EXPERTS, size)
    local_experts = placement.experts_of_rank[rank]
    dispatchers, reason = make_dispatchers(kind, groups, placement, CAPACITY, device)
    assert reason.startswith(kind)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.3), (torch.float16, 0.05)):
        load = ExpertLoad(1, len(local_experts), device)
        chosen = torch.zeros(NUM_EXPERTS, dtype=torch.int64)
        for step, all_counts in enumerate(TOKEN_COUNTS):
            counts = all_counts[:size]
            if not any(counts):
                continue
            assert groups.agree([counts[rank], step]) == [[count, step] for count in counts]
            for r, count in enumerate(counts):
                ids = _tokens_or_none(100 * step + r, count, dtype)[1]
                chosen += ids.reshape(-1).bincount(minlength=NUM_EXPERTS)
            x, ids, weights = _tokens_or_none(100 * step + rank, counts[rank], dtype)
            before = dataclasses.astuple(dispatchers.traffic)
            dispatcher = load.watch(dispatchers.for_step(counts))
            sent = dispatcher.dispatch(x.to(device), ids.to(device), weights.to(device))
            y = torch.zeros_like(sent.x_GH, dtype=torch.float32)
            for k in range(TOP_K):
                for local, expert in enumerate(local_experts):
                    here = sent.local_ids_GK[:, k] == local
                    y[here] += (
                        _expert(sent.x_GH[here].float(), expert) * sent.weights_GK[here, k, None].float()
                    )
            out = dispatcher.combine(y.to(dtype), sent)
            after = dataclasses.astuple(dispatchers.traffic)
            ids_of_ranks = [_tokens_or_none(100 * step + r, n, dtype)[1] for r, n in enumerate(counts)]
            expected = _sent_bytes(kind, placement, rank, ids_of_ranks, dtype)
            assert (after[0] - before[0], after[1] - before[1]) == expected, (kind, dtype, step)
            assert out.device == sent.x_GH.device
            assert out.shape == x.shape
            assert out.dtype == dtype
            torch.testing.assert_close(
                out.double().cpu(),
                _reference(x, ids, weights),
                atol=tolerance,
                rtol=tolerance / 10,
                msg=lambda text: f"{kind}, {dtype}, step {step}: {text}",  # noqa: B023 - called at once
            )
        assert load.tokens_per_expert()[0].tolist() == chosen[list(local_experts)].tolist()


def _sent_bytes(
    kind: str, placement: ExpertPlacement, rank: int, ids_of_ranks: list[torch.Tensor], dtype: torch.dtype
) -> tuple[int, int]:
    """What this rank must have sent by dispatch and by combine."""
    others = [r for r in range(placement.num_ranks) if r != rank]
    row_bytes = HIDDEN * dtype.itemsize
    packed_bytes = TokenPacking(HIDDEN, TOP_K, dtype).row_bytes
    most = max(map(len, ids_of_ranks))
    rank_of = placement.rank_of_expert()

    def num_meetings(tokens_of: int, experts_of: int) -> int:
        """Tokens of one rank that chose an expert of another."""
        return sum(experts_of in {rank_of[e] for e in row} for row in ids_of_ranks[tokens_of].tolist())

    returned = sum(num_meetings(other, rank) for other in others) * row_bytes
    if kind == "all_gather":
        return len(others) * most * packed_bytes, len(others) * most * row_bytes
    if kind == "all_to_all":
        counts_bytes = len(others) * 8
        return sum(num_meetings(rank, other) for other in others) * packed_bytes + counts_bytes, returned
    return len(ids_of_ranks[rank]) * (row_bytes + TOP_K * (4 + dtype.itemsize)), returned
