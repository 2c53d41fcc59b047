/* A model but for its head in one call: its layers one after another, their experts here or on several ranks.
 *
 * Shape legend: T tokens, G tokens of all ranks, H hidden, K experts a token.
 */
#include "layers.h"
#include "shared_expert.h"

namespace {

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

/* A model but for its head. */
struct Decoder {
    const void *embedding;
    int64_t vocabulary;
    const Layer *layers;
    int64_t num_layers;
    const void *norm_weight;
};

/* How a step's tokens come to the experts of all ranks, and their weighted sums back. Both functions return 0, or why they
 * ended before they were done.
 *
 * dispatch(context, x, bytes of a row, ids, weights, bytes of a row, local ids): then `x` [G, H] and `weights` [G, K] hold
 * all ranks' tokens, and `local ids` [G, K] those of their experts that live here, else -1.
 * combine(context, sums [G, H], ids, element type, out, meanwhile, with): `meanwhile(with)` is called once this rank's sums
 * are shown to the others and before theirs are waited for. */
struct Exchange {
    int32_t (*dispatch)(const void *, const void *, int64_t, const int64_t *, const void *, int64_t, int64_t *);
    int32_t (*combine)(const void *, const void *, const int64_t *, int32_t, void *, void (*)(void *), void *);
    const void *context, *x, *weights;
    int64_t rows;
};

/* Between operations: `x`, `mixed`, `normed` and `routed` [T, H], `weights` [T, K]; with an exchange `sums` [G, H] and
 * `ids` [T, K], of experts on all ranks. */
struct Between {
    void *x, *mixed, *normed, *routed, *weights, *sums;
    int64_t *ids;
};

/* The routed experts that live here: out [rows, H]. Nonzero: there is no memory, as ids from a router are in range. */
inline int64_t run_experts(const Tokens &tokens, const RoutedExperts &experts, const void *x, const int64_t *ids,
                           const void *weights, int64_t top_k, void *out, int64_t rows) {
    return MOE_NAME(moe_fused_experts)(x, tokens.hidden, tokens.is_bf16, ids, weights, experts.gate_up, experts.down,
                                       experts.type, experts.gate_up_scale, experts.down_scale, out, rows, top_k,
                                       experts.num_experts, tokens.hidden, experts.intermediate, tokens.threads);
}

enum Ended { DONE = 0, NO_MEMORY = 1, NOT_IN_VOCABULARY = 2, EXCHANGE_ENDED = 3 };

/* The experts of one layer and what they are added to, all of them here: between.mixed to between.x. */
inline Ended mix_here(const Tokens &tokens, const Layer &layer, const Between &between, int64_t *ids) {
    const int64_t top_k = layer.router->top_k;
    if (MOE_NAME(moe_norm_and_route)(&tokens, layer.router, between.normed, ids, between.weights) ||
        run_experts(tokens, *layer.experts, between.normed, ids, between.weights, top_k, between.routed, tokens.count) ||
        MOE_NAME(moe_add_experts)(&tokens, layer.shared, between.normed, between.routed, between.x))
        return NO_MEMORY;
    return DONE;
}

/* The same with experts on several ranks. The shared expert is computed while sums of others are on their way.
 * `reason`: what the exchange returned where it ended. */
inline Ended mix_everywhere(const Tokens &tokens, const Layer &layer, const Between &between, const Exchange &exchange,
                            int64_t *local_ids, int64_t *reason) {
    const int64_t top_k = layer.router->top_k, H = tokens.hidden;
    if (MOE_NAME(moe_norm_and_route)(&tokens, layer.router, between.normed, between.ids, between.weights)) return NO_MEMORY;
    *reason = exchange.dispatch(exchange.context, between.normed, H * tokens.size(), between.ids, between.weights,
                                top_k * tokens.size(), local_ids);
    if (*reason) return EXCHANGE_ENDED;
    if (run_experts(tokens, *layer.experts, exchange.x, local_ids, exchange.weights, top_k, between.sums, exchange.rows))
        return NO_MEMORY;
    SharedSums shared(tokens, *layer.shared, between.normed);
    const auto meanwhile = [](void *with) { static_cast<SharedSums *>(with)->compute(); };
    *reason = exchange.combine(exchange.context, between.sums, between.ids, static_cast<int32_t>(tokens.is_bf16),
                               between.routed, meanwhile, &shared);
    if (*reason) return EXCHANGE_ENDED;
    if (shared.failed) return NO_MEMORY;
    shared.add_to(between.routed, between.x);
    return DONE;
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

/* out = norm(layers(embedding[token_ids])) of `num_wanted` tokens, ascending; -1: of all. `ids`: the experts that each
 * layer chose, [layers, T, K], -1 where the last one had no need to; with an exchange the local experts, [layers, G, K],
 * -1 for those elsewhere, and all tokens are wanted. Of the tokens, `x` is not read. Returns one of `Ended`. */
MOE_EXPORT(int64_t, moe_decoder)
(const Tokens *given, const Decoder *decoder, const Step *step, const int64_t *token_ids, const int64_t *wanted,
 int64_t num_wanted, const Exchange *exchange, const Between *given_between, int64_t *ids, int64_t *reason, void *out) {
    Tokens tokens = *given;
    const Between &between = *given_between;
    const int64_t row_size = tokens.hidden * tokens.size(), rows = exchange ? exchange->rows : given->count;
    for (int64_t t = 0; t < tokens.count; t++) {
        if (token_ids[t] < 0 || token_ids[t] >= decoder->vocabulary) return NOT_IN_VOCABULARY;
        memcpy(static_cast<char *>(between.x) + t * row_size,
               static_cast<const char *>(decoder->embedding) + token_ids[t] * row_size, static_cast<size_t>(row_size));
    }
    for (int64_t i = 0; i < decoder->num_layers; i++) {
        const Layer &layer = decoder->layers[i];
        const int64_t top_k = layer.router->top_k;
        tokens.x = between.x;
        if (layer.delta_net ? MOE_NAME(moe_gated_delta_net)(&tokens, layer.delta_net, step, between.mixed)
                            : MOE_NAME(moe_gated_attention)(&tokens, layer.attention, step, between.mixed))
            return NO_MEMORY;
        tokens.x = between.mixed;
        if (num_wanted >= 0 && i + 1 == decoder->num_layers) {
            // What comes after this layer's mixer is of no use to other tokens.
            for (int64_t n = 0; n < num_wanted; n++)
                memmove(static_cast<char *>(between.mixed) + n * row_size,
                        static_cast<const char *>(between.mixed) + wanted[n] * row_size, static_cast<size_t>(row_size));
            tokens.count = num_wanted;
        }
        const Ended ended = exchange ? mix_everywhere(tokens, layer, between, *exchange, ids, reason)
                                     : mix_here(tokens, layer, between, ids);
        if (ended != DONE) return ended;
        if (tokens.count < given->count) spread_rows(ids, top_k, wanted, num_wanted, given->count);
        ids += rows * top_k;
    }
    tokens.x = between.x;
    tokens.norm(decoder->norm_weight, out);
    return DONE;
}
