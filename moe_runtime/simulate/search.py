"""Search: the largest batch that memory and a target for the time of a token allow, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass

from moe_runtime.simulate.deployment import Deployment
from moe_runtime.simulate.step import Step, StepTime, step_time

_MAX_BATCH = 4096  # sequences a rank; more than any scheduler runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A deployment at work, one way to run it."""

    batch: int  # sequences of each rank in a decode step, or tokens in a prefill step; 0: nothing fits
    limited_by: (
        str  # what kept the batch from growing: "memory", "TPOT", "batch" (as asked), or why nothing fits
    )
    time: StepTime | None  # None: nothing fits

    @property
    def tokens_per_s(self) -> float:
        """Of one GPU."""
        return self.batch / self.time.total if self.time else 0.0

    @property
    def tpot_s(self) -> float:
        """Seconds from a request's token to its next, in decode."""
        return self.time.total if self.time else float("inf")


def decode(
    deployment: Deployment,
    input_len: int,
    output_len: int,
    *,
    tpot_s: float | None = None,
    batch: int | None = None,
) -> Operation:
    """Decode with all of a rank's sequences half way through their outputs.

    Args:
        tpot_s: no larger batch than one whose step takes so long.
        batch: exactly so many sequences a rank instead.
    """
    largest = deployment.max_sequences(input_len + output_len)
    context = input_len + output_len / 2
    if not largest:
        return Operation(batch=0, limited_by=deployment.why_nothing_fits(), time=None)
    if batch is not None:
        if batch > largest:
            reason = (
                f"memory holds {largest} sequences of {input_len + output_len} tokens a rank, not {batch}"
            )
            return Operation(batch=0, limited_by=reason, time=None)
        return _at(deployment, batch, context, "batch")
    limit = "memory" if largest <= _MAX_BATCH else "largest batch"
    largest = min(largest, _MAX_BATCH)
    whole = _at(deployment, largest, context, limit)
    if tpot_s is None or whole.tpot_s <= tpot_s:
        return whole
    return _largest_within(deployment, largest, context, tpot_s)


def prefill(deployment: Deployment, input_len: int, tokens: int) -> Operation:
    """Prefill with `tokens` tokens of prompts of `input_len` in each step of a rank."""
    if not deployment.max_sequences(input_len):
        return Operation(batch=0, limited_by=deployment.why_nothing_fits(), time=None)
    time = step_time(deployment, Step(tokens=tokens, context=min(input_len, tokens), is_prefill=True))
    return Operation(batch=tokens, limited_by="batch", time=time)


def _largest_within(deployment: Deployment, too_large: int, context: float, tpot_s: float) -> Operation:
    low, high = 0, too_large
    best = None
    while high - low > 1:
        middle = (low + high) // 2
        tried = _at(deployment, middle, context, "TPOT")
        if tried.tpot_s <= tpot_s:
            low, best = middle, tried
        else:
            high = middle
    if best is None:
        alone = _at(deployment, 1, context, "TPOT")
        reason = f"a step of one sequence takes {1e3 * alone.tpot_s:.1f} ms, above {1e3 * tpot_s:g} ms"
        return Operation(batch=0, limited_by=reason, time=None)
    return best


def _at(deployment: Deployment, batch: int, context: float, limited_by: str) -> Operation:
    return Operation(
        batch=batch, limited_by=limited_by, time=step_time(deployment, Step(tokens=batch, context=context))
    )
