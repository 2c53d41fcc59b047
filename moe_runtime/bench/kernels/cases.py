"""Case: one operation on inputs that no cache holds, called our way and torch's, for whatever device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moe_kernels.aot.roofline import Work
from moe_kernels.huge_pages import advise_huge_pages
from moe_kernels.select import Choice, KernelPlan
from moe_kernels.sequences import PackedSequences
from moe_kernels.shapes import KernelShapes

Call = Callable[[], object]

# Measured data must not fit a cache: it is read in turns over so many times the cache.
CACHE_MULTIPLE = 4
_NUM_RANDOM = 1 << 16  # different values; what they are does not matter, only that none is rare or slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table."""

    name: str
    calls: Sequence[Call]  # ours, with different inputs, to be made in turns
    torch_calls: Sequence[Call]  # the same with torch alone
    torch_way: str  # what that is
    work: Work  # of one call, on average


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """For what cases are made."""

    device: torch.device
    plan: KernelPlan  # ours
    shapes: KernelShapes  # of the model
    cache_bytes: int  # of the cache that inputs must not fit
    decode_sequences: int  # with a token each
    context: int  # tokens before each of these
    prefill_tokens: int  # of one prompt

    def turns(self, num_bytes: int) -> int:
        """How many inputs of `num_bytes` to take in turns."""
        return turns_past_cache(num_bytes, self.cache_bytes)

    def filled(
        self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> torch.Tensor:
        """Random values that repeat; int8 ones are codes from -127 to 127, whatever `scale` is."""
        x = torch.empty(shape, dtype=dtype, device=self.device)
        if self.device.type == "cpu":
            advise_huge_pages([x])  # as a rank's weights are
        generator = torch.Generator().manual_seed(seed)
        if dtype == torch.int8:
            some = torch.randint(-127, 128, (_NUM_RANDOM,), generator=generator)
        else:
            some = torch.randn(_NUM_RANDOM, generator=generator) * scale
        some = some.to(self.device, dtype)
        flat, size = x.view(-1), min(x.numel(), _NUM_RANDOM)
        flat[:size] = some[:size]
        while size < flat.numel():
            more = min(size, flat.numel() - size)
            flat[size : size + more] = flat[:more]
            size += more
        return x

    def decodes(self, context: int) -> PackedSequences:
        """One token of each sequence."""
        return self._packed((1,) * self.decode_sequences, (context,) * self.decode_sequences, is_decode=True)

    def prompt(self) -> PackedSequences:
        """One new sequence."""
        return self._packed((self.prefill_tokens,), (0,), is_decode=False)

    def _packed(
        self, query_lens: tuple[int, ...], context_lens: tuple[int, ...], *, is_decode: bool
    ) -> PackedSequences:
        starts = [sum(query_lens[:i]) for i in range(len(query_lens) + 1)]
        return PackedSequences(
            cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=self.device),
            context_lens_B=torch.tensor(context_lens, dtype=torch.int32, device=self.device),
            query_lens=query_lens,
            context_lens=context_lens,
            num_decodes=len(query_lens) if is_decode else 0,
        )


def turns_past_cache(num_bytes: int, cache_bytes: int) -> int:
    """How many pieces of `num_bytes` to read in turns, so that each is out of the cache when it comes again."""
    return math.ceil(CACHE_MULTIPLE * cache_bytes / num_bytes) + 1


def make_case(
    name: str,
    operation: Callable[..., object],
    choice: Choice,
    inputs: Sequence[tuple[Any, ...]],
    work: Work,
    *,
    torch_implementation: str = "reference",
    torch_way: str = "reference",
) -> Case:
    """`operation` of moe_kernels with each of `inputs`: as `choice` says, and as its plain torch does it."""
    launch = {} if choice.launch is None else {"launch": choice.launch}
    return Case(
        name=name,
        calls=[partial(operation, *some, implementation=choice.implementation, **launch) for some in inputs],
        torch_calls=[partial(operation, *some, implementation=torch_implementation) for some in inputs],
        torch_way=torch_way,
        work=work,
    )
