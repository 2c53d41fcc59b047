/* The layers in one call each: what they are given, and what lies between their operations.
 *
 * Shape legend: T tokens, H hidden, K key sizes of all heads, C convolution channels, N value heads, V values of all heads,
 * Q query sizes of all heads, M key and value sizes of all heads, E experts, F intermediate of the shared expert.
 */
#pragma once

#include "exports.h"
#include "scratch.h"

namespace {

/* The C structures of blocks/structures.py. */
struct Matrix {
    const void *weight;
    const float *scale;
    int64_t type, rows, columns;
};

struct Step {
    const int32_t *starts, *contexts;
    const int64_t *checkpoints, *state_slots, *kv_slots;
    const int32_t *tables;
    const void *cosine, *sine;
    int64_t num_seqs, num_decodes, num_checkpoints, table_stride, rotary_size;
};

/* What the tokens come as: `x` [T, H] with its type. */
struct Tokens {
    const void *x;
    int64_t count, hidden, is_bf16, threads;
    float eps;

    int64_t size() const { return is_bf16 ? 2 : 4; }
    /* `rows` of a tensor whose elements have the tokens' type, from a column on. */
    const char *column(const char *rows, int64_t column) const { return rows + column * size(); }

    int64_t linear(const void *from, const Matrix &by, void *to) const {
        return MOE_NAME(moe_linear)(from, by.columns, is_bf16, by.weight, by.type, by.scale, to, count, by.rows, by.columns,
                                    threads);
    }
    void norm(const void *weight, void *to) const {
        MOE_NAME(moe_rms_norm)(x, 1, hidden, 0, weight, eps, 1.0f, to, count, hidden, is_bf16, threads);
    }
};

struct DeltaNet {
    const void *norm_weight;
    Matrix in_proj_qkvz, in_proj_ba, out_proj;
    const void *conv_weight;
    const float *a_log, *dt_bias;
    const void *gated_norm_weight;
    void *conv_states;
    float *states;
    int64_t key_heads, value_heads, key_size, value_size, conv_width;
};

struct Attention {
    const void *norm_weight;
    Matrix in_proj, out_proj;
    const void *q_norm_weight, *k_norm_weight;
    void *k_cache, *v_cache;
    int64_t block_size, heads, kv_heads, head_size;
    float scale;
};

struct Router {
    const void *norm_weight;
    Matrix router;
    int64_t top_k, renormalize;
};

struct SharedExpert {
    Matrix gate_up, down, gate;
};

/* Memory for what lies between operations: `parts(take)` takes each part, and is called once to count, once to take. */
template <class Parts>
inline bool take_parts(const Parts &parts) {
    int64_t bytes = 0;
    parts([&](int64_t size) {
        bytes += Scratch::size_of<char>(size);
        return static_cast<char *>(nullptr);
    });
    if (!scratch.reserve(bytes)) return false;
    parts([](int64_t size) { return scratch.take<char>(size); });
    return true;
}

}  // namespace

/* Each is described in blocks.cpp. */
MOE_EXPORT(int64_t, moe_gated_delta_net)(const Tokens *given, const DeltaNet *layer, const Step *step, void *out);
MOE_EXPORT(int64_t, moe_gated_attention)(const Tokens *given, const Attention *layer, const Step *step, void *out);
MOE_EXPORT(int64_t, moe_norm_and_route)
(const Tokens *given, const Router *layer, void *normed, int64_t *ids, void *weights);
MOE_EXPORT(int64_t, moe_add_experts)
(const Tokens *given, const SharedExpert *layer, const void *normed, const void *routed, void *out);
