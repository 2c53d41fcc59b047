"""Running every kernel that the plan can need once, so that none is compiled while requests are served.

Shape legend: T tokens of a batch, B sequences, G rows at the experts, H hidden, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from moe_kernels.select import KernelPlan
from moe_models.batch import ForwardBatch
from moe_models.interfaces import CausalLM, Dispatched, LayerCache
from moe_runtime.rank_spec import StartUpStep

# Tokens of a prompt: more than one chunk of any kernel, and not a multiple of one.
_PROMPT_TOKENS = 129
# Tokens before a decode: enough that kernels attend to them in more than one part.
_LONG_CONTEXT = 1000


def warm_up(
    model: CausalLM,
    caches: tuple[LayerCache, ...],
    plan: KernelPlan,
    *,
    block_size: int,
    num_local_experts: int,
    device: torch.device,
) -> Iterator[StartUpStep]:
    """Run batches that between them need every kernel; yields a step after each, and an empty one before them all.

    What they write to the caches means nothing; no sequence may be in them yet.
    """
    decode = _batch([1], [1], num_decodes=1, block_size=block_size, device=device)
    batches = [(decode, rows) for rows in plan.warm_up_rows()]
    if batches:
        # A prompt alone; a prompt that goes on, beside a late decode and with a kept state.
        # In slot 0, as there may be no third.
        mixed = ([1, _PROMPT_TOKENS], [_LONG_CONTEXT, block_size], 1, ((1, 64, 0),))
        for lens, contexts, decodes, checkpoints in (([_PROMPT_TOKENS], [0], 0, ()), mixed):
            batch = _batch(
                lens,
                contexts,
                num_decodes=decodes,
                block_size=block_size,
                device=device,
                state_checkpoints=checkpoints,
            )
            batches.append((batch, batch.num_tokens))
    # The first batch takes longest: whoever watches is to know what it waits for.
    yield StartUpStep("compile", 0, len(batches))
    for batch, rows in batches:
        with torch.inference_mode():
            hidden_TH = model(batch, caches, _RowsDispatcher(rows, num_local_experts))
            model.compute_logits(hidden_TH[:1])
        yield StartUpStep("compile", 1, len(batches))


class _RowsDispatcher:
    """Has a stated number of rows reach the experts, however many tokens the batch has."""

    def __init__(self, rows: int, num_local_experts: int) -> None:
        self._rows = rows
        self._num_local_experts = num_local_experts

    def dispatch(
        self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> Dispatched:
        """The batch's rows over and over, G of them."""
        row_G = torch.arange(self._rows, device=x_TH.device) % x_TH.shape[0]
        ids_GK = topk_ids_TK[row_G]
        return Dispatched(
            x_GH=x_TH[row_G],
            local_ids_GK=torch.where(ids_GK < self._num_local_experts, ids_GK, -1),
            weights_GK=topk_weights_TK[row_G],
            handle=x_TH,
        )

    def combine(self, y_GH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Something of the right shape."""
        return torch.zeros_like(dispatched.handle)


def _batch(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    *,
    num_decodes: int,
    block_size: int,
    device: torch.device,
    state_checkpoints: tuple[tuple[int, int, int], ...] = (),
) -> ForwardBatch:
    """Sequences whose keys and values all live in block 0, where nothing is kept."""
    num_tokens = sum(query_lens)
    longest = max(q + c for q, c in zip(query_lens, context_lens, strict=True))
    positions = [c + i for q, c in zip(query_lens, context_lens, strict=True) for i in range(q)]
    starts = torch.tensor([0, *query_lens]).cumsum(0)

    def whole(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return ForwardBatch(
        token_ids_T=whole([0] * num_tokens),
        positions_T=whole(positions),
        cu_seqlens=starts.to(device, torch.int32),
        context_lens_B=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables_BM=torch.zeros(
            (len(query_lens), -(-longest // block_size)), dtype=torch.int32, device=device
        ),
        kv_slots_T=whole([position % block_size for position in positions]),
        state_slots_B=whole(list(range(len(query_lens)))),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
        num_decodes=num_decodes,
        state_checkpoints=state_checkpoints,
    )
