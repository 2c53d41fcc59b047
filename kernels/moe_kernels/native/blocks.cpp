/* Layers in one call each: the exported operations one after another, without Python between them.
 *
 * Shape legend: T tokens, H hidden, K key sizes of all heads, C convolution channels, N value heads, V values of all heads,
 * Q query sizes of all heads, M key and value sizes of all heads, E experts, F intermediate of the shared expert.
 */
#include "exports.h"
#include "scratch.h"
#include "simd.h"
#include "threads.h"

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

struct RoutedExperts {
    const void *gate_up, *down;
    const float *gate_up_scale, *down_scale;
    int64_t type, num_experts, intermediate;
};

/* One of the first two is null. */
struct Layer {
    const DeltaNet *delta_net;
    const Attention *attention;
    const Router *router;
    const RoutedExperts *experts;
    const SharedExpert *shared;
};

/* A model whose experts are all here, but for its head. */
struct Decoder {
    const void *embedding;
    int64_t vocabulary;
    const Layer *layers;
    int64_t num_layers;
    const void *norm_weight;
};

/* Between operations: `x`, `mixed`, `normed` and `routed` [T, H], `weights` [T, K]. */
struct Between {
    void *x, *mixed, *normed, *routed, *weights;
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

constexpr int64_t SERIAL_VALUES = 1 << 16;  // with fewer, a thread is done before a second one has woken

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

/* out = x + (routed + sigmoid(gate) * shared), rounded where tensors between the operations would be. */
template <class Y>
inline void combine(const Tokens &tokens, const Y *routed, const Y *gate, const Y *shared, Y *out) {
    const Y *x = static_cast<const Y *>(tokens.x);
    parallel(tokens.count * tokens.hidden < SERIAL_VALUES ? 1 : tokens.threads, [&](Team team) {
        const Range own = team.share(tokens.count);
        for (int64_t t = own.begin; t < own.end; t++) {
            const vec weight = rounded<Y>(sigmoid(broadcast(load_part(gate + t, 1)[0])));
            for (int64_t h = t * tokens.hidden; h < (t + 1) * tokens.hidden; h += WIDTH) {
                const int64_t lanes = at_most(WIDTH, (t + 1) * tokens.hidden - h);
                const vec ours = rounded<Y>(weight * load_part(shared + h, lanes));
                const vec experts = rounded<Y>(load_part(routed + h, lanes) + ours);
                store_part(out + h, load_part(x + h, lanes) + experts, lanes);
            }
        }
    });
}

/* Move rows 0, 1, 2 ... to where they are wanted among `count`, with -1 in all others. */
inline void spread_rows(int64_t *rows, int64_t width, const int64_t *wanted, int64_t num_wanted, int64_t count) {
    for (int64_t to = count - 1, from = num_wanted - 1; to >= 0; to--) {
        const bool is_wanted = from >= 0 && wanted[from] == to;
        for (int64_t k = 0; k < width; k++) rows[to * width + k] = is_wanted ? rows[from * width + k] : -1;
        from -= is_wanted;
    }
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
    const Tokens &tokens = *given;
    const int64_t T = tokens.count, both = layer->gate_up.rows, one = both / 2;
    char *gate_up, *inner, *shared, *gate;
    const auto parts = [&](auto &&take) {
        gate_up = take(T * both * tokens.size());
        inner = take(T * one * tokens.size());
        shared = take(T * tokens.hidden * tokens.size());
        gate = take(T * tokens.size());
    };
    if (!take_parts(parts)) return 1;
    if (tokens.linear(normed, layer->gate_up, gate_up)) return 1;
    MOE_NAME(moe_silu_and_mul)(gate_up, both, inner, T, one, tokens.is_bf16, tokens.threads);
    if (tokens.linear(inner, layer->down, shared) || tokens.linear(normed, layer->gate, gate)) return 1;
    if (tokens.is_bf16)
        combine(tokens, static_cast<const bf16 *>(routed), reinterpret_cast<const bf16 *>(gate),
                reinterpret_cast<const bf16 *>(shared), static_cast<bf16 *>(out));
    else
        combine(tokens, static_cast<const float *>(routed), reinterpret_cast<const float *>(gate),
                reinterpret_cast<const float *>(shared), static_cast<float *>(out));
    return 0;
}

/* out = norm(layers(embedding[token_ids])) of `num_wanted` tokens, ascending; -1: of all. `ids` [layers, T, K], the experts
 * that each layer chose, -1 where the last one had no need to. Of the tokens, `x` is not read. Returns 0, 1 if there is no
 * memory, or 2 for a token that is not in the vocabulary. */
MOE_EXPORT(int64_t, moe_decoder)
(const Tokens *given, const Decoder *decoder, const Step *step, const int64_t *token_ids, const int64_t *wanted,
 int64_t num_wanted, const Between *given_between, int64_t *ids, void *out) {
    Tokens tokens = *given;
    const Between &between = *given_between;
    const int64_t row_size = tokens.hidden * tokens.size();
    for (int64_t t = 0; t < tokens.count; t++) {
        if (token_ids[t] < 0 || token_ids[t] >= decoder->vocabulary) return 2;
        memcpy(static_cast<char *>(between.x) + t * row_size,
               static_cast<const char *>(decoder->embedding) + token_ids[t] * row_size, static_cast<size_t>(row_size));
    }
    for (int64_t i = 0; i < decoder->num_layers; i++) {
        const Layer &layer = decoder->layers[i];
        const RoutedExperts &experts = *layer.experts;
        const int64_t top_k = layer.router->top_k;
        tokens.x = between.x;
        if (layer.delta_net ? MOE_NAME(moe_gated_delta_net)(&tokens, layer.delta_net, step, between.mixed)
                            : MOE_NAME(moe_gated_attention)(&tokens, layer.attention, step, between.mixed))
            return 1;
        tokens.x = between.mixed;
        if (num_wanted >= 0 && i + 1 == decoder->num_layers) {
            // What comes after this layer's mixer is of no use to other tokens.
            for (int64_t n = 0; n < num_wanted; n++)
                memmove(static_cast<char *>(between.mixed) + n * row_size,
                        static_cast<const char *>(between.mixed) + wanted[n] * row_size, static_cast<size_t>(row_size));
            tokens.count = num_wanted;
        }
        if (MOE_NAME(moe_norm_and_route)(&tokens, layer.router, between.normed, ids, between.weights)) return 1;
        if (MOE_NAME(moe_fused_experts)(between.normed, tokens.hidden, tokens.is_bf16, ids, between.weights,
                                        experts.gate_up, experts.down, experts.type, experts.gate_up_scale,
                                        experts.down_scale, between.routed, tokens.count, top_k, experts.num_experts,
                                        tokens.hidden, experts.intermediate, tokens.threads) ||
            MOE_NAME(moe_add_experts)(&tokens, layer.shared, between.normed, between.routed, between.x))
            return 1;
        if (tokens.count < given->count) spread_rows(ids, top_k, wanted, num_wanted, given->count);
        ids += given->count * top_k;
    }
    tokens.x = between.x;
    tokens.norm(decoder->norm_weight, out);
    return 0;
}
