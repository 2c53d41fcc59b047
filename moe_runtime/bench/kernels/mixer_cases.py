"""Cases of the operations that mix tokens: the gated delta rule, its convolution, attention; decode and prefill.

Shape legend: T tokens, B sequences, C channels, N heads, M key/value heads, D and V sizes of a head.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_kernels.aot.roofline import Work
from moe_kernels.aot.work import StepLoad, work_of
from moe_kernels.attention import paged_attention
from moe_kernels.conv import causal_conv1d
from moe_kernels.gated_delta import gated_delta_rule
from moe_kernels.sequences import PackedSequences
from moe_runtime.bench.kernels.cases import Case, Setting, make_case

_BLOCK = 16  # tokens of a page of the cache
_CONV_WIDTH = 4  # Qwen3-Next's
_FLOAT32, _BFLOAT16 = 4, 2


def mixer_cases(setting: Setting) -> list[Case]:
    """Their inputs filled: some hundreds of megabytes each."""
    return [
        _delta_decode(setting),
        _delta_prefill(setting),
        _conv(setting, "decode"),
        _conv(setting, "prefill"),
        _attention_decode(setting),
        _attention_prefill(setting),
    ]


def counted_work(launch_name: str, setting: Setting, num_tokens: int) -> Work:
    """What the compiled kernels' table (`--static`) counts for such a step."""
    load = StepLoad(shapes=setting.shapes, num_tokens=num_tokens, context=setting.context)
    work = work_of(launch_name, load)
    assert work is not None, launch_name
    return work


def _state_bytes(setting: Setting) -> int:
    """Of one sequence's state of the delta rule."""
    shapes = setting.shapes
    return shapes.num_value_heads * shapes.key_size * shapes.value_size * _FLOAT32


def _delta_inputs(setting: Setting, turns: int, tokens: int, sequences: PackedSequences) -> list[Any]:
    """Each turn has its own states, and its own q, k and v."""
    shapes, count = setting.shapes, len(sequences.query_lens)
    keys = (turns, tokens, shapes.num_key_heads, shapes.key_size)
    q, k = (setting.filled(*keys, seed=seed) for seed in (1, 2))
    v = setting.filled(turns, tokens, shapes.num_value_heads, shapes.value_size, seed=3)
    decay = torch.full((tokens, shapes.num_value_heads), -0.1, device=setting.device)
    beta = setting.filled(tokens, shapes.num_value_heads, seed=4).sigmoid()
    sizes = (turns * count, shapes.num_value_heads, shapes.key_size, shapes.value_size)
    state = setting.filled(*sizes, scale=0.1, dtype=torch.float32, seed=5)
    slots = torch.arange(turns * count, device=setting.device).view(turns, count)
    return [(q[i], k[i], v[i], decay, beta, state, slots[i], sequences) for i in range(turns)]


def _delta_decode(setting: Setting) -> Case:
    count = setting.decode_sequences
    inputs = _delta_inputs(
        setting, setting.turns(count * _state_bytes(setting)), count, setting.decodes(setting.context)
    )
    work = counted_work("gated_delta.decode", setting, count)
    name = f"gated delta decode B={count}, state read and written"
    return make_case(name, gated_delta_rule, setting.plan.gated_delta, inputs, work)


def _delta_prefill(setting: Setting) -> Case:
    """Counted as the recurrence, which takes the fewest operations; chunks buy matrix products with more."""
    tokens, shapes = setting.prefill_tokens, setting.shapes
    values = 2 * (shapes.num_key_heads * shapes.key_size + shapes.num_value_heads * shapes.value_size)
    moved = tokens * values * _BFLOAT16
    inputs = _delta_inputs(setting, setting.turns(moved), tokens, setting.prompt())
    state_bytes = _state_bytes(setting)
    work = Work(7.0 * tokens * state_bytes / _FLOAT32, moved + state_bytes)
    return make_case(
        f"gated delta prefill T={tokens}", gated_delta_rule, setting.plan.gated_delta, inputs, work
    )


def _conv(setting: Setting, part: str) -> Case:
    shapes = setting.shapes
    channels = 2 * shapes.num_key_heads * shapes.key_size + shapes.num_value_heads * shapes.value_size
    if part == "decode":
        tokens, sequences = setting.decode_sequences, setting.decodes(setting.context)
        name = f"convolution decode B={tokens} C={channels}"
    else:
        tokens, sequences = setting.prefill_tokens, setting.prompt()
        name = f"convolution prefill T={tokens} C={channels}"
    work = counted_work(f"conv.{part}", setting, tokens)
    turns, count = setting.turns(round(work.num_bytes)), len(sequences.query_lens)
    x = setting.filled(turns, tokens, channels, seed=1)
    weight = setting.filled(channels, _CONV_WIDTH, scale=0.5, seed=2)
    state = setting.filled(turns * count, channels, _CONV_WIDTH - 1, seed=3)
    slots = torch.arange(turns * count, device=setting.device).view(turns, count)
    inputs = [(x[i], weight, state, slots[i], sequences) for i in range(turns)]
    return make_case(name, causal_conv1d, setting.plan.conv, inputs, work)


def _attention_inputs(setting: Setting, turns: int, tokens: int, sequences: PackedSequences) -> list[Any]:
    """Each turn has its own pages; q, k, v and the gate are few beside them, or not what takes the time."""
    shapes, count = setting.shapes, len(sequences.query_lens)
    longest = sequences.context_lens[0] + sequences.query_lens[0]
    num_blocks = -(-longest // _BLOCK)
    sizes = (turns * count * num_blocks, _BLOCK, shapes.num_kv_heads, shapes.head_size)
    k_cache, v_cache = (setting.filled(*sizes, seed=seed) for seed in (1, 2))
    q, gate = (setting.filled(tokens, shapes.num_heads, shapes.head_size, seed=seed) for seed in (3, 4))
    k, v = (setting.filled(tokens, shapes.num_kv_heads, shapes.head_size, seed=seed) for seed in (5, 6))
    tables = torch.arange(sizes[0], dtype=torch.int32, device=setting.device).view(turns, count, num_blocks)
    # The places of the last tokens of each sequence's pages.
    places = torch.arange(longest - sequences.query_lens[0], longest, device=setting.device)
    starts = tables[:, :, :1].long() * _BLOCK
    slots = (starts + places).view(turns, tokens)
    scale = shapes.head_size**-0.5
    return [(q, k, v, k_cache, v_cache, slots[i], tables[i], sequences, scale, gate) for i in range(turns)]


def _attention_decode(setting: Setting) -> Case:
    count = setting.decode_sequences
    work = counted_work("attention.decode", setting, count)
    inputs = _attention_inputs(
        setting, setting.turns(round(work.num_bytes)), count, setting.decodes(setting.context)
    )
    name = f"attention decode B={count} context {setting.context}"
    return make_case(name, paged_attention, setting.plan.attention, inputs, work)


def _attention_prefill(setting: Setting) -> Case:
    tokens = setting.prefill_tokens
    work = counted_work("attention.prefill", setting, tokens)
    inputs = _attention_inputs(setting, 1, tokens, setting.prompt())
    return make_case(f"attention prefill T={tokens}", paged_attention, setting.plan.attention, inputs, work)
