"""How many operations and bytes each kernel's task takes at least, for one layer of one rank in one step.

Shape legend: T tokens of each rank, G those of all ranks together, H hidden, F expert intermediate, E experts,
L local experts, K top-k, C tokens of a DeltaNet chunk, D key size, V value size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_kernels.aot.roofline import Work
from moe_kernels.sequences import PREFILL_CHUNK
from moe_kernels.shapes import KernelShapes

_FLOAT32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """What a rank computes in one step; every rank the same, and every expert is as likely as any other."""

    shapes: KernelShapes
    num_tokens: int  # of each rank
    context: int  # tokens before each decode's; a prefill's are one prompt without any
    weight_bytes: float = 2  # of an expert's weight; a scale for each 128 x 128 of them is not counted
    value_bytes: int = 2  # of every other value

    @property
    def all_tokens(self) -> int:
        """G."""
        return self.num_tokens * self.shapes.num_experts // max(self.shapes.num_local_experts, 1)

    @property
    def active_experts(self) -> float:
        """Local experts that some token chose, on average."""
        missed = (1 - self.shapes.top_k / self.shapes.num_experts) ** self.all_tokens
        return self.shapes.num_local_experts * (1 - missed)

    @property
    def expert_rows(self) -> int:
        """Choices of local experts: as many as the rank's own tokens make, since all ranks are alike."""
        return self.num_tokens * self.shapes.top_k


def work_of(launch_name: str, load: StepLoad) -> Work | None:
    """What the launch of this name ("gated_delta.decode ...") has to do; None where nobody has counted."""
    count = _COUNTS.get(launch_name) or _COUNTS.get(launch_name.split(" ")[0])
    return None if count is None else count(load)


def weight_bytes_of(dtype: torch.dtype) -> float:
    """Bytes that an expert's weight of this type takes, its share of a block's float32 scale with it."""
    return 1 + _FLOAT32 / 128**2 if dtype == torch.float8_e4m3fn else dtype.itemsize


def _gate_up(load: StepLoad) -> Work:
    hidden, inner = load.shapes.hidden_size, load.shapes.moe_intermediate_size
    rows, tokens = load.expert_rows, min(load.expert_rows, load.all_tokens)
    weights = load.active_experts * 2 * inner * hidden * load.weight_bytes
    return Work(4 * rows * inner * hidden, weights + (tokens * hidden + rows * inner) * load.value_bytes)


def _down(load: StepLoad) -> Work:
    hidden, inner = load.shapes.hidden_size, load.shapes.moe_intermediate_size
    rows, tokens = load.expert_rows, min(load.expert_rows, load.all_tokens)
    weights = load.active_experts * inner * hidden * load.weight_bytes
    return Work(2 * rows * inner * hidden, weights + (tokens * hidden + rows * inner) * load.value_bytes)


def _route(load: StepLoad) -> Work:
    shapes = load.shapes
    num_bytes = shapes.num_experts * load.value_bytes + shapes.top_k * (load.value_bytes + 8)
    return Work(0, load.num_tokens * num_bytes)


def _delta_values(load: StepLoad) -> int:
    """Values of q, k, v and the output of one token."""
    shapes = load.shapes
    return 2 * (shapes.num_key_heads * shapes.key_size + shapes.num_value_heads * shapes.value_size)


def _delta_decode(load: StepLoad) -> Work:
    shapes = load.shapes
    state = load.num_tokens * shapes.num_value_heads * shapes.key_size * shapes.value_size
    # Decay 1; what the state has for k 2; adding the correction 2; reading it with q 2.
    return Work(7 * state, 2 * state * _FLOAT32 + load.num_tokens * _delta_values(load) * load.value_bytes)


def _delta_prepare(load: StepLoad) -> Work:
    shapes, chunk = load.shapes, PREFILL_CHUNK
    key, value = shapes.key_size, shapes.value_size
    rows = load.num_tokens * shapes.num_value_heads
    # k k^T, q k^T, and the inverse's products with k and v.
    flops = 2 * rows * chunk * (2 * key + key + value)
    written = rows * (key + value + chunk) * load.value_bytes
    return Work(flops, load.num_tokens * _delta_values(load) * load.value_bytes + written)


def _delta_scan(load: StepLoad) -> Work:
    shapes, chunk = load.shapes, PREFILL_CHUNK
    key, value = shapes.key_size, shapes.value_size
    rows = load.num_tokens * shapes.num_value_heads
    # w S, q S and k^T u, and the scores with u.
    flops = 2 * rows * value * (3 * key + chunk)
    read = rows * (key + value + chunk) * load.value_bytes
    state = 2 * shapes.num_value_heads * key * value * _FLOAT32
    return Work(flops, load.num_tokens * _delta_values(load) * load.value_bytes + read + state)


def _conv(load: StepLoad, state_values: int) -> Work:
    shapes = load.shapes
    channels = (
        2 * shapes.num_key_heads * shapes.key_size + shapes.num_value_heads * shapes.value_size
    ) * load.num_tokens
    return Work(8 * channels, channels * (2 + state_values) * load.value_bytes)


def _attention_decode(load: StepLoad) -> Work:
    shapes = load.shapes
    pairs = load.num_tokens * load.context
    cached = pairs * 2 * shapes.num_kv_heads * shapes.head_size
    return Work(4 * pairs * shapes.num_heads * shapes.head_size, cached * load.value_bytes)


def _attention_prefill(load: StepLoad) -> Work:
    shapes = load.shapes
    pairs = load.num_tokens * (load.num_tokens + 1) / 2
    heads = 3 * shapes.num_heads + 2 * shapes.num_kv_heads  # q, the gate and the output; k and v
    values = load.num_tokens * heads * shapes.head_size
    return Work(4 * pairs * shapes.num_heads * shapes.head_size, values * load.value_bytes)


def _values(per_token: Callable[[KernelShapes], int]) -> Callable[[StepLoad], Work]:
    """An operation that touches so many values of a token once each."""
    return lambda load: Work(0, load.num_tokens * per_token(load.shapes) * load.value_bytes)


_COUNTS: dict[str, Callable[[StepLoad], Work]] = {
    "grouped_gemm.gate_up": _gate_up,
    "grouped_gemm.down": _down,
    "routing.route": _route,
    "gated_delta.decode": _delta_decode,
    "gated_delta.prepare": _delta_prepare,
    "gated_delta.scan": _delta_scan,
    "gated_delta.gates": _values(lambda s: 5 * s.num_value_heads),  # the decay is in float32
    "conv.decode": lambda load: _conv(load, state_values=6),  # three inputs, read and written
    "conv.prefill": lambda load: _conv(load, state_values=0),
    "attention.decode": _attention_decode,
    "attention.prefill": _attention_prefill,
    "attention.write": _values(lambda s: 4 * s.num_kv_heads * s.head_size),
    "norm.rms_norm": _values(lambda s: 2 * s.hidden_size),
    "norm.rms_norm heads": _values(lambda s: 2 * s.num_heads * s.head_size),
    "norm.rms_norm_gated": _values(lambda s: 3 * s.num_value_heads * s.value_size),
    "norm.rotary": _values(lambda s: 2 * (s.num_heads + s.num_kv_heads) * s.head_size),
    "norm.silu_and_mul": _values(lambda s: 3 * s.moe_intermediate_size),
}
