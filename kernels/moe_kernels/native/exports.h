/* The exported functions that other exported functions call; each is described where it is defined. */
#pragma once

#include "level.h"

MOE_EXPORT(int64_t, moe_linear)
(const void *x, int64_t x_stride, int64_t x_type, const void *w, int64_t w_type, const float *scale, void *y, int64_t T,
 int64_t N, int64_t K, int64_t num_threads);

MOE_EXPORT(int64_t, moe_fused_experts)
(const void *x, int64_t x_stride, int64_t x_type, const int64_t *ids, const void *weights, const void *gate_up,
 const void *down, int64_t w_type, const float *gate_up_scale, const float *down_scale, void *y, int64_t G, int64_t K,
 int64_t L, int64_t H, int64_t F, int64_t num_threads);

MOE_EXPORT(void, moe_rms_norm)
(const void *x, int64_t inner, int64_t outer_stride, int64_t inner_stride, const void *weight, float eps, float shift,
 void *out, int64_t num_rows, int64_t size, int64_t is_bf16, int64_t threads);

MOE_EXPORT(void, moe_rms_norm_gated)
(const void *x, int64_t inner, int64_t outer_stride, int64_t inner_stride, const void *gate, int64_t gate_outer_stride,
 int64_t gate_inner_stride, const void *weight, float eps, void *out, int64_t num_rows, int64_t size, int64_t is_bf16,
 int64_t threads);

MOE_EXPORT(void, moe_silu_and_mul)
(const void *x, int64_t stride, void *out, int64_t num_rows, int64_t size, int64_t is_bf16, int64_t threads);

MOE_EXPORT(void, moe_apply_rotary)
(const void *x, int64_t inner, int64_t outer_stride, int64_t inner_stride, const void *cosine, const void *sine,
 int64_t turned, void *out, int64_t num_rows, int64_t size, int64_t is_bf16, int64_t threads);

MOE_EXPORT(void, moe_route)
(const void *logits, int64_t stride, int64_t num_tokens, int64_t num_experts, int64_t top_k, int64_t renormalize,
 int64_t *ids, void *weights, int64_t is_bf16, int64_t threads);

MOE_EXPORT(void, moe_gated_delta_rule)
(const void *q, int64_t q_stride, const void *k, int64_t k_stride, const void *v, int64_t v_stride, const float *decay,
 const void *beta, float *states, const int64_t *slots, const int32_t *starts, const int32_t *contexts, void *out,
 int64_t num_seqs, int64_t num_decodes, const int64_t *checkpoints, int64_t num_checkpoints, int64_t num_heads,
 int64_t group, int64_t key_size, int64_t value_size, int64_t is_bf16, int64_t threads);

MOE_EXPORT(void, moe_delta_gates)
(const void *a, int64_t a_stride, const void *b, int64_t b_stride, const float *a_log, const float *dt_bias,
 int64_t num_tokens, int64_t num_heads, float *decay, void *beta, int64_t is_bf16);

MOE_EXPORT(void, moe_causal_conv1d)
(const void *x, int64_t x_stride, const void *weight, void *states, const int64_t *slots, const int32_t *starts,
 const int32_t *contexts, void *out, int64_t num_seqs, const int64_t *checkpoints, int64_t num_checkpoints,
 int64_t num_channels, int64_t width, int64_t is_bf16, int64_t threads);

MOE_EXPORT(void, moe_paged_attention)
(const void *const *pointers, const int64_t *strides, const int64_t *slots, const int32_t *tables,
 const int32_t *starts, const int32_t *contexts, const int64_t *sizes, float scale, int64_t num_seqs, int64_t is_bf16,
 int64_t threads);
