"""Dispatch between ranks of one host through shared memory: tokens are written once and read where they lie.

Shape legend: T tokens of this rank, G tokens of all ranks, H hidden, K top-k, E logical experts, W ranks.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import accumulate

import torch

from moe_kernels.blocks import decoder
from moe_models.interfaces import Dispatched, OneCall, TokenDispatcher
from moe_runtime.experts.placement import ExpertPlacement
from moe_runtime.parallel.capacity import StepCapacity
from moe_runtime.parallel.host_library import BFLOAT16, FLOAT16, FLOAT32, Buffers, Exchange, Step, address_of
from moe_runtime.parallel.host_link import HostLink, data_offset
from moe_runtime.parallel.traffic import Traffic

_DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

# Partial sums travel in chunks of so many tokens a rank that their buffers, which grow with the square of the
# number of ranks, stay below this.
_PARTS_BYTES = 64 << 20
_MIN_CHUNK_TOKENS = 8
_ALIGN = 4096


@dataclass(frozen=True, slots=True)
class _Layout:
    """Byte offsets in the mapping, and the tokens of one chunk of partial sums."""

    x: int
    weights: int
    ids: int
    parts: int
    end: int
    chunk_tokens: int

    @classmethod
    def of(cls, capacity: StepCapacity, num_ranks: int, start: int) -> _Layout:
        row_bytes = capacity.hidden_size * capacity.dtype.itemsize
        pairs = num_ranks * num_ranks
        fitting = _PARTS_BYTES // (2 * pairs * row_bytes)
        chunk = min(capacity.max_tokens, max(_MIN_CHUNK_TOKENS, fitting))
        rows = num_ranks * capacity.max_tokens
        sizes = (
            rows * row_bytes,
            rows * capacity.top_k * 8,  # weights of any floating-point dtype
            rows * capacity.top_k * 4,  # ids as int32
            2 * pairs * chunk * row_bytes,
        )
        x, weights, ids, parts, end = accumulate(
            (-(-size // _ALIGN) * _ALIGN for size in sizes), initial=start
        )
        return cls(x, weights, ids, parts, end, chunk)


class SharedMemoryDispatcher:
    """Holds the buffers, which stay the same between steps."""

    def __init__(self, link: HostLink, placement: ExpertPlacement, capacity: StepCapacity) -> None:
        """Map the buffers; no rank waits for another here.

        Raises:
            ConfigError: the machine has not enough memory for them.
        """
        self.link = link
        self.capacity = capacity
        layout = _Layout.of(capacity, link.size, data_offset())
        self.num_bytes = layout.end - data_offset()
        self.memory = torch.frombuffer(link.map(self.num_bytes), dtype=torch.uint8)
        self.layout = layout
        self._rank_of_E = torch.tensor(placement.rank_of_expert(), dtype=torch.int32)
        self._local_id_E = torch.full((placement.num_experts,), -1, dtype=torch.int32)
        mine = torch.tensor(placement.experts_of_rank[link.rank], dtype=torch.int64)
        self._local_id_E[mine] = torch.arange(len(mine), dtype=torch.int32)
        base = self.memory.data_ptr()
        self._buffers = Buffers(
            x=base + layout.x,
            weights=base + layout.weights,
            parts=base + layout.parts,
            ids=base + layout.ids,
            local_of_expert=self._local_id_E.data_ptr(),
            rank_of_expert=self._rank_of_E.data_ptr(),
            hidden=capacity.hidden_size,
            top_k=capacity.top_k,
            num_experts=placement.num_experts,
            chunk_tokens=layout.chunk_tokens,
        )
        self.buffers_at = ctypes.addressof(self._buffers)

    def for_step(self, token_counts: tuple[int, ...]) -> TokenDispatcher:
        assert max(token_counts) <= self.capacity.max_tokens, (
            f"a rank has {max(token_counts)} tokens in a step, its buffers hold {self.capacity.max_tokens}"
        )
        return _SharedMemoryStep(self, token_counts)

    @property
    def traffic(self) -> Traffic:
        return Traffic(*self.link.sent_bytes())

    def rows(self, offset: int, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """View of [num_rows, width] at a byte offset of the mapping."""
        return (
            self.memory[offset : offset + num_rows * width * dtype.itemsize].view(dtype).view(num_rows, width)
        )


class _SharedMemoryStep:
    def __init__(self, shared: SharedMemoryDispatcher, token_counts: tuple[int, ...]) -> None:
        self._shared = shared
        self._link = shared.link
        self._num_rows = sum(token_counts)  # G
        self._step = Step(rows=self._num_rows, most=max(token_counts))
        size = len(token_counts)
        self._step.counts[:size] = token_counts
        self._step.firsts[:size] = list(accumulate(token_counts, initial=0))[:-1]
        self._exchange = Exchange(shared.link.address, shared.buffers_at, ctypes.addressof(self._step))
        self._exchange_at = ctypes.addressof(self._exchange)
        self._views: tuple[torch.Tensor, torch.Tensor] | None = None  # x_GH and weights_GK

    @property
    def one_call(self) -> OneCall:
        """See `one_call_of`."""
        self._link.check_open("a step")
        dtype = self._shared.capacity.dtype
        x_GH, weights_GK = self._views_of(dtype, dtype)
        library = self._link.library
        exchange = decoder.Exchange(
            address_of(library.moe_dispatch),
            address_of(library.moe_combine),
            self._exchange_at,
            x_GH,
            weights_GK,
            lambda state: self._link.check("a step", state),
        )
        return OneCall(exchange=exchange)

    def dispatch(
        self, x_TH: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> Dispatched:
        """See TokenDispatcher. What is returned lies in shared memory and holds until `combine` is called."""
        capacity = self._shared.capacity
        assert x_TH.shape[1] == capacity.hidden_size, (x_TH.shape, capacity)
        assert topk_weights_TK.shape[1] == capacity.top_k, (topk_weights_TK.shape, capacity)
        x_GH, weights_GK = self._views_of(x_TH.dtype, topk_weights_TK.dtype)
        x_TH, topk_weights_TK = x_TH.contiguous(), topk_weights_TK.contiguous()
        ids = topk_ids_TK.long().contiguous()
        local_ids_GK = torch.empty((self._num_rows, ids.shape[1]), dtype=torch.int64)
        self._link.run(
            "dispatching tokens",
            self._link.library.moe_dispatch,
            self._exchange_at,
            x_TH.data_ptr(),
            x_TH.shape[1] * x_TH.itemsize,
            ids.data_ptr(),
            topk_weights_TK.data_ptr(),
            ids.shape[1] * topk_weights_TK.itemsize,
            local_ids_GK.data_ptr(),
        )
        return Dispatched(x_GH=x_GH, local_ids_GK=local_ids_GK, weights_GK=weights_GK, handle=ids)

    def combine(self, y_GH: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """See TokenDispatcher."""
        ids: torch.Tensor = dispatched.handle
        y_GH = y_GH.contiguous()
        out_TH = torch.empty((ids.shape[0], y_GH.shape[1]), dtype=y_GH.dtype)
        self._link.run(
            "combining partial sums",
            self._link.library.moe_combine,
            self._exchange_at,
            y_GH.data_ptr(),
            ids.data_ptr(),
            _DTYPES[y_GH.dtype],
            out_TH.data_ptr(),
            None,
            None,
        )
        return out_TH

    def _views_of(self, dtype: torch.dtype, weights_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of all ranks, and their weights, in shared memory."""
        if self._views is None:
            shared, capacity = self._shared, self._shared.capacity
            assert dtype.itemsize <= capacity.dtype.itemsize, (dtype, capacity)
            self._views = (
                shared.rows(shared.layout.x, self._num_rows, capacity.hidden_size, dtype),
                shared.rows(shared.layout.weights, self._num_rows, capacity.top_k, weights_dtype),
            )
        return self._views
