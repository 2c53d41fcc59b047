"""Fit: how many sequences of what length a rank's memory holds beside its weights, or why none does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_runtime.errors import ConfigError
from moe_runtime.inspection.sizes import format_size

if TYPE_CHECKING:
    from moe_runtime.inspection.model_info import ModelInfo

_COMMON_LENGTHS = (4096, 32768)  # tokens; a chat and a long document, shown beside the model's own maximum


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What one rank can hold at one EP size. Bytes, lengths and counts are of a single rank."""

    expert_parallel_size: int
    device_memory: int  # bytes of the device
    usable_bytes: int  # of it for weights and caches; the rest is for activations and communication buffers
    weight_bytes: int
    cache_bytes: int  # left for KV cache and DeltaNet state; negative where the weights alone do not fit
    sequences: tuple[tuple[int, int], ...]  # (length in tokens, sequences of it at once), lengths ascending
    max_sequence_length: int  # tokens of the longest single sequence; 0 where none fits
    reason: str | None  # why nothing fits; None where something does

    @property
    def fits(self) -> bool:
        """Whether a sequence of at least one token fits."""
        return self.reason is None


def compute_fit(info: ModelInfo, device_memory: int, ep_size: int, memory_utilization: float = 0.9) -> Fit:
    """See `ModelInfo.fit`."""
    if not 0 < memory_utilization <= 1:
        raise ConfigError(f"memory_utilization must be above 0 and at most 1, got {memory_utilization!r}")
    weights = info.weight_bytes_per_rank(ep_size)
    usable = int(device_memory * memory_utilization)
    left = usable - weights
    lengths = sorted(
        {length for length in _COMMON_LENGTHS if length < info.max_model_len} | {info.max_model_len}
    )
    longest = _longest_sequence(info, left)
    return Fit(
        expert_parallel_size=ep_size,
        device_memory=device_memory,
        usable_bytes=usable,
        weight_bytes=weights,
        cache_bytes=left,
        sequences=tuple((n, max(0, left) // info.sequence_bytes(n)) for n in lengths),
        max_sequence_length=longest,
        reason=None if longest else _why_none(info, usable, weights, ep_size),
    )


def _longest_sequence(info: ModelInfo, cache_bytes: int) -> int:
    if cache_bytes < info.sequence_bytes(1):
        return 0
    if not info.kv_bytes_per_token:
        return info.max_model_len
    return min(info.max_model_len, (cache_bytes - info.state_bytes_per_request) // info.kv_bytes_per_token)


def _why_none(info: ModelInfo, usable: int, weights: int, ep_size: int) -> str:
    need = weights + info.sequence_bytes(1)
    what = f"weights need {format_size(weights)} a rank at EP {ep_size}"
    if weights <= usable:
        what += f" and one sequence {format_size(need - weights)} more"
    enough = _smallest_ep(info, usable - info.sequence_bytes(1))
    way_out = f"EP {enough} or more fits" if enough else "no EP size fits; use devices with more memory"
    return f"{what}, {format_size(usable)} are usable; {way_out}"


def _smallest_ep(info: ModelInfo, weight_budget: int) -> int | None:
    return next((ep for ep in info.legal_ep_sizes if info.weight_bytes_per_rank(ep) <= weight_budget), None)
