"""What the native library exports: each function's arguments and result, without the instruction set in its name."""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p

import torch

# The C++ enumeration Type.
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

# Tensors go as `tensor.data_ptr()`; all sizes, strides (in elements) and the number of threads are int64.
SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    # x, x_stride, x_type, w, w_type, scale, y, T, N, K, num_threads -> 0, or 1 if there is no memory
    "moe_linear": (
        [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p, *[c_int64] * 4],
        c_int64,
    ),
    # x, x_stride, x_type, ids, weights, gate_up, down, w_type, gate_up_scale, down_scale, y, G, K, L, H, F,
    # num_threads -> 0, 1 if there is no memory, or 2 for an id that is not a local expert's
    "moe_fused_experts": (
        [c_void_p, c_int64, c_int64, *[c_void_p] * 4, c_int64, *[c_void_p] * 3, *[c_int64] * 6],
        c_int64,
    ),
    # data, bytes, num_streams, prefetch, num_threads -> a value that depends on what was read
    "moe_read_stream": ([c_void_p, c_int64, c_int64, c_int64, c_int64], c_int64),
    # Rows of x lie at outer * outer_stride + inner * inner_stride, `inner` of them side by side.
    # x, inner, outer_stride, inner_stride, weight, eps, shift, out, rows, size, is_bf16, num_threads
    "moe_rms_norm": (
        [c_void_p, *[c_int64] * 3, c_void_p, c_float, c_float, c_void_p, *[c_int64] * 4],
        None,
    ),
    # x, inner, outer_stride, inner_stride, gate, its strides, weight, eps, out, rows, size, is_bf16, num_threads
    "moe_rms_norm_gated": (
        [c_void_p, *[c_int64] * 3, c_void_p, c_int64, c_int64, c_void_p, c_float, c_void_p, *[c_int64] * 4],
        None,
    ),
    # x, x_stride, out, rows, size, is_bf16, num_threads
    "moe_silu_and_mul": ([c_void_p, c_int64, c_void_p, *[c_int64] * 4], None),
    # x, inner, outer_stride, inner_stride, cos, sin, turned, out, rows, size, is_bf16, num_threads
    "moe_apply_rotary": (
        [c_void_p, *[c_int64] * 3, c_void_p, c_void_p, c_int64, c_void_p, *[c_int64] * 4],
        None,
    ),
    # logits, stride, T, E, K, renormalize, ids, weights, is_bf16, num_threads
    "moe_route": ([c_void_p, *[c_int64] * 5, c_void_p, c_void_p, c_int64, c_int64], None),
    # q, k and v, each with its stride; decay, beta, states, slots, starts, contexts, out, sequences, decodes,
    # checkpoints, their number, heads, value heads a key head, D, V, is_bf16, num_threads
    "moe_gated_delta_rule": (
        [*[c_void_p, c_int64] * 3, *[c_void_p] * 7, c_int64, c_int64, c_void_p, *[c_int64] * 7],
        None,
    ),
    # a, a_stride, b, b_stride, a_log, dt_bias, T, N, decay, beta, is_bf16
    "moe_delta_gates": (
        [*[c_void_p, c_int64] * 2, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64],
        None,
    ),
    # x, x_stride, weight, states, slots, starts, contexts, out, sequences, checkpoints, their number, channels,
    # taps, is_bf16, num_threads
    "moe_causal_conv1d": (
        [c_void_p, c_int64, *[c_void_p] * 6, c_int64, c_void_p, *[c_int64] * 5],
        None,
    ),
    # pointers, strides, slots, tables, starts, contexts, sizes (see attention.cpp), scale, sequences, is_bf16,
    # num_threads
    "moe_paged_attention": ([*[c_void_p] * 7, c_float, *[c_int64] * 3], None),
    # Layers in one call: structures of blocks/structures.py, then tensors -> 0, or 1 if there is no memory.
    # tokens, layer, step, out
    "moe_gated_delta_net": ([c_void_p] * 4, c_int64),
    "moe_gated_attention": ([c_void_p] * 4, c_int64),
    # tokens, layer, normed, ids, weights
    "moe_norm_and_route": ([c_void_p] * 5, c_int64),
    # tokens, layer, normed, routed, out
    "moe_add_experts": ([c_void_p] * 5, c_int64),
    # tokens, decoder, step, token ids, wanted tokens, their number, exchange, between, ids, why the exchange ended,
    # out; 2 for a token that is not in the vocabulary, 3 where the exchange ended
    "moe_decoder": ([*[c_void_p] * 5, c_int64, *[c_void_p] * 5], c_int64),
}
