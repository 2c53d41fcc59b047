/* Layers in one call each: the exported operations one after another, without Python between them. */
#include "layers.h"
#include "shared_expert.h"
#include "simd.h"
#include "threads.h"

namespace {

/* y += x, for `count` values; on threads where that pays. */
template <class Y>
inline void add(const Y *x, Y *y, int64_t count, int64_t threads) {
    parallel(count < SERIAL_VALUES ? 1 : threads, [&](Team team) {
        const Range own = team.share(count, WIDTH);
        for (int64_t at = own.begin; at < own.end; at += WIDTH) {
            const int64_t lanes = at_most(WIDTH, own.end - at);
            store_part(y + at, load_part(x + at, lanes) + load_part(y + at, lanes), lanes);
        }
    });
}

inline void add_tokens(const Tokens &tokens, void *out) {
    const int64_t count = tokens.count * tokens.hidden;
    if (tokens.is_bf16)
        add(static_cast<const bf16 *>(tokens.x), static_cast<bf16 *>(out), count, tokens.threads);
    else
        add(static_cast<const float *>(tokens.x), static_cast<float *>(out), count, tokens.threads);
}

}  // namespace

/* Each returns 0, or 1 if there is no memory. `out` [T, H] is not `x`. */

MOE_EXPORT(int64_t, moe_gated_delta_net)
(const Tokens *given, const DeltaNet *given_layer, const Step *given_step, void *out) {
    const Tokens &tokens = *given;
    const DeltaNet &layer = *given_layer;
    const Step &step = *given_step;
    const int64_t keys = layer.key_heads * layer.key_size, values = layer.value_heads * layer.value_size;
    const int64_t channels = 2 * keys + values, T = tokens.count, gates = T * layer.value_heads;
    char *normed, *qkvz, *ba, *qkv, *beta, *decay, *heads, *gated;
    const auto parts = [&](auto &&take) {
        normed = take(T * tokens.hidden * tokens.size());
        qkvz = take(T * (channels + values) * tokens.size());
        ba = take(2 * gates * tokens.size());
        qkv = take(T * channels * tokens.size());
        beta = take(gates * tokens.size());
        decay = take(gates * static_cast<int64_t>(sizeof(float)));
        heads = take(T * values * tokens.size());
        gated = take(T * values * tokens.size());
    };
    if (!take_parts(parts)) return 1;
    tokens.norm(layer.norm_weight, normed);
    if (tokens.linear(normed, layer.in_proj_qkvz, qkvz) || tokens.linear(normed, layer.in_proj_ba, ba)) return 1;
    MOE_NAME(moe_causal_conv1d)(qkvz, channels + values, layer.conv_weight, layer.conv_states, step.state_slots,
                                step.starts, step.contexts, qkv, step.num_seqs, step.checkpoints,
                                step.num_checkpoints, channels, layer.conv_width, tokens.is_bf16, tokens.threads);
    const int64_t n = layer.value_heads;
    float *decays = reinterpret_cast<float *>(decay);
    MOE_NAME(moe_delta_gates)(tokens.column(ba, n), 2 * n, ba, 2 * n, layer.a_log, layer.dt_bias, T, n, decays, beta,
                              tokens.is_bf16);
    MOE_NAME(moe_gated_delta_rule)(qkv, channels, tokens.column(qkv, keys), channels, tokens.column(qkv, 2 * keys),
                                   channels, decays, beta, layer.states, step.state_slots, step.starts,
                                   step.contexts, heads, step.num_seqs, step.num_decodes,
                                   step.checkpoints, step.num_checkpoints, n, n / layer.key_heads,
                                   layer.key_size, layer.value_size, tokens.is_bf16, tokens.threads);
    MOE_NAME(moe_rms_norm_gated)(heads, n, values, layer.value_size, tokens.column(qkvz, channels), channels + values,
                                 layer.value_size, layer.gated_norm_weight, tokens.eps, gated, T * n, layer.value_size,
                                 tokens.is_bf16, tokens.threads);
    if (tokens.linear(gated, layer.out_proj, out)) return 1;
    add_tokens(tokens, out);
    return 0;
}

MOE_EXPORT(int64_t, moe_gated_attention)
(const Tokens *given, const Attention *given_layer, const Step *given_step, void *out) {
    const Tokens &tokens = *given;
    const Attention &layer = *given_layer;
    const Step &step = *given_step;
    const int64_t d = layer.head_size, T = tokens.count, q_size = layer.heads * d, kv_size = layer.kv_heads * d;
    const int64_t width = 2 * q_size + 2 * kv_size;
    char *normed, *all, *q_normed, *q, *attended, *k_normed, *k;
    const auto parts = [&](auto &&take) {
        normed = take(T * tokens.hidden * tokens.size());
        all = take(T * width * tokens.size());
        q_normed = take(T * q_size * tokens.size());
        q = take(T * q_size * tokens.size());
        attended = take(T * q_size * tokens.size());
        k_normed = take(T * kv_size * tokens.size());
        k = take(T * kv_size * tokens.size());
    };
    if (!take_parts(parts)) return 1;
    tokens.norm(layer.norm_weight, normed);
    if (tokens.linear(normed, layer.in_proj, all)) return 1;
    const char *gate = tokens.column(all, q_size), *k_raw = tokens.column(all, 2 * q_size);
    const char *v = tokens.column(all, 2 * q_size + kv_size);
    const auto norm_and_turn = [&](const char *from, int64_t heads, const void *weight, char *in_between, char *to) {
        MOE_NAME(moe_rms_norm)(from, heads, width, d, weight, tokens.eps, 1.0f, in_between, T * heads, d, tokens.is_bf16,
                               tokens.threads);
        MOE_NAME(moe_apply_rotary)(in_between, heads, heads * d, d, step.cosine, step.sine, step.rotary_size, to,
                                   T * heads, d, tokens.is_bf16, tokens.threads);
    };
    norm_and_turn(all, layer.heads, layer.q_norm_weight, q_normed, q);
    norm_and_turn(k_raw, layer.kv_heads, layer.k_norm_weight, k_normed, k);
    const void *pointers[] = {q, k, v, layer.k_cache, layer.v_cache, gate, attended};
    const int64_t strides[] = {q_size, kv_size, width, step.table_stride, width};
    const int64_t sizes[] = {layer.block_size, layer.heads, layer.kv_heads, d};
    MOE_NAME(moe_paged_attention)(pointers, strides, step.kv_slots, step.tables, step.starts, step.contexts,
                                  sizes, layer.scale, step.num_seqs, tokens.is_bf16, tokens.threads);
    if (tokens.linear(attended, layer.out_proj, out)) return 1;
    add_tokens(tokens, out);
    return 0;
}

/* `normed` [T, H]; ids and weights as `moe_route` gives them. */
MOE_EXPORT(int64_t, moe_norm_and_route)
(const Tokens *given, const Router *layer, void *normed, int64_t *ids, void *weights) {
    const Tokens &tokens = *given;
    const int64_t num_experts = layer->router.rows;
    char *logits;
    if (!take_parts([&](auto &&take) { logits = take(tokens.count * num_experts * tokens.size()); })) return 1;
    tokens.norm(layer->norm_weight, normed);
    if (tokens.linear(normed, layer->router, logits)) return 1;
    MOE_NAME(moe_route)(logits, num_experts, tokens.count, num_experts, layer->top_k, layer->renormalize, ids, weights,
                        tokens.is_bf16, tokens.threads);
    return 0;
}

/* out = x + routed + sigmoid(gate(normed)) * shared expert(normed). */
MOE_EXPORT(int64_t, moe_add_experts)
(const Tokens *given, const SharedExpert *layer, const void *normed, const void *routed, void *out) {
    SharedSums sums(*given, *layer, normed);
    sums.compute();
    if (sums.failed) return 1;
    sums.add_to(routed, out);
    return 0;
}
