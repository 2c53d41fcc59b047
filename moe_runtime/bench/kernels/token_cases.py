"""Cases of the operations that take each token by itself: norms, rotary positions, gates, routing, SiLU products.

Shape legend: T tokens, E experts, H hidden, F expert intermediate, N heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_kernels.gated_delta import delta_gates
from moe_kernels.norm import apply_rotary, rms_norm, rms_norm_gated, silu_and_mul
from moe_kernels.routing import route
from moe_kernels.select import Choice
from moe_runtime.bench.kernels.cases import Case, Setting, make_case
from moe_runtime.bench.kernels.mixer_cases import counted_work

_EPS = 1e-6
_ROTARY_SHARE = 4  # of a head's dimensions, one in so many is turned: Qwen3-Next's


def token_cases(setting: Setting) -> list[Case]:
    """A prompt's tokens each: with a decode's few, the call itself is all that takes time."""
    return [
        _rms_norm(setting),
        _rms_norm_gated(setting),
        _rotary(setting),
        _silu_and_mul(setting),
        _delta_gates(setting),
        _route(setting),
    ]


def _case(
    setting: Setting,
    name: str,
    launch_name: str,
    operation: Callable[..., object],
    choice: Choice,
    make_inputs: Callable[[int], list[tuple[Any, ...]]],
) -> Case:
    """Of as many inputs as have to take turns, made by `make_inputs`."""
    work = counted_work(launch_name, setting, setting.prefill_tokens)
    inputs = make_inputs(setting.turns(round(work.num_bytes)))
    return make_case(f"{name} T={setting.prefill_tokens}", operation, choice, inputs, work)


def _rms_norm(setting: Setting) -> Case:
    hidden = setting.shapes.hidden_size
    weight = setting.filled(hidden, scale=0.1, seed=1)

    def inputs(turns: int) -> list[tuple[Any, ...]]:
        return [(x, weight, _EPS, True) for x in setting.filled(turns, setting.prefill_tokens, hidden)]

    return _case(setting, f"RMSNorm H={hidden}", "norm.rms_norm", rms_norm, setting.plan.norm, inputs)


def _rms_norm_gated(setting: Setting) -> Case:
    heads, size = setting.shapes.num_value_heads, setting.shapes.value_size
    weight = setting.filled(size, seed=1)

    def inputs(turns: int) -> list[tuple[Any, ...]]:
        x, gate = (setting.filled(turns, setting.prefill_tokens, heads, size, seed=seed) for seed in (2, 3))
        return [(x[i], gate[i], weight, _EPS) for i in range(turns)]

    name = f"gated RMSNorm N={heads} D={size}"
    return _case(setting, name, "norm.rms_norm_gated", rms_norm_gated, setting.plan.norm, inputs)


def _rotary(setting: Setting) -> Case:
    shapes, tokens = setting.shapes, setting.prefill_tokens
    half = setting.filled(tokens, shapes.head_size // _ROTARY_SHARE // 2, dtype=torch.float32)
    angles = half.repeat(1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def inputs(turns: int) -> list[tuple[Any, ...]]:
        q = setting.filled(turns, tokens, shapes.num_heads, shapes.head_size, seed=1)
        k = setting.filled(turns, tokens, shapes.num_kv_heads, shapes.head_size, seed=2)
        return [(q[i], k[i], cos, sin) for i in range(turns)]

    name = f"rotary N={shapes.num_heads}+{shapes.num_kv_heads} D={shapes.head_size}"
    return _case(setting, name, "norm.rotary", apply_rotary, setting.plan.norm, inputs)


def _silu_and_mul(setting: Setting) -> Case:
    inner = setting.shapes.moe_intermediate_size

    def inputs(turns: int) -> list[tuple[Any, ...]]:
        return [(x,) for x in setting.filled(turns, setting.prefill_tokens, 2 * inner)]

    name = f"SiLU and multiply F={inner}"
    return _case(setting, name, "norm.silu_and_mul", silu_and_mul, setting.plan.norm, inputs)


def _delta_gates(setting: Setting) -> Case:
    heads = setting.shapes.num_value_heads
    a_log, dt_bias = (setting.filled(heads, dtype=torch.float32, seed=seed) for seed in (1, 2))

    def inputs(turns: int) -> list[tuple[Any, ...]]:
        a, b = (setting.filled(turns, setting.prefill_tokens, heads, seed=seed) for seed in (3, 4))
        return [(a[i], b[i], a_log, dt_bias) for i in range(turns)]

    name = f"delta rule's gates N={heads}"
    return _case(setting, name, "gated_delta.gates", delta_gates, setting.plan.gated_delta, inputs)


def _route(setting: Setting) -> Case:
    experts, top_k = setting.shapes.num_experts, setting.shapes.top_k

    def inputs(turns: int) -> list[tuple[Any, ...]]:
        return [(x, top_k, True) for x in setting.filled(turns, setting.prefill_tokens, experts)]

    name = f"routing E={experts} K={top_k}"
    return _case(setting, name, "routing.route", route, setting.plan.routing, inputs)
