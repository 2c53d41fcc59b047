/* The router: softmax over all experts, the most probable few, their weights. */
#include "exports.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t MAX_EXPERTS = 4096;
constexpr int64_t SERIAL_VALUES = 32768;
constexpr float LEAST_EXP = 1.3e-38f;  // `exp` returns something just below this where the result should be 0

/* e^(x - highest); a NaN counts as the least there is, so that the experts chosen always differ. */
inline vec exponential(vec x, vec highest) { return exp(max(x - highest, broadcast(-87.3f))); }

/* e^(x - largest) of `count` logits into `out`; returns their sum. */
template <class T>
inline float exponentials(const T *logits, int64_t count, float *out) {
    vec best = broadcast(-__builtin_inff());
    int64_t e = 0;
    for (; e + WIDTH <= count; e += WIDTH) best = max(best, load(logits + e));
    float highest = largest(best);
    for (int64_t i = e; i < count; i++) {
        float one[WIDTH];
        store(one, load_part(logits + i, 1));
        highest = one[0] > highest ? one[0] : highest;
    }
    vec total = zero();
    for (e = 0; e + WIDTH <= count; e += WIDTH) {
        const vec x = exponential(load(logits + e), broadcast(highest));
        store(out + e, x);
        total += x;
    }
    float rest = 0.0f;
    if (e < count) {
        store_part(out + e, exponential(load_part(logits + e, count - e), broadcast(highest)), count - e);
        for (; e < count; e++) rest += out[e];
    }
    return sum(total) + rest;
}

/* The `top_k` largest, largest first, the lower index first among equals. */
inline void select_best(const float *values, int64_t count, int64_t top_k, int64_t *ids, float *best) {
    for (int64_t k = 0; k < top_k; k++) {
        ids[k] = k;  // stays, with a weight of its own, where a row holds nothing but NaN
        best[k] = -1.0f;
    }
    // Few of many experts are better than what is there already: most vectors need one comparison.
    for_vectors(count, [&](int64_t first, int64_t lanes) {
        uint32_t above = lanes_above(load_first(values + first, lanes), broadcast(best[top_k - 1]));
        for (above &= (1u << lanes) - 1; above != 0; above &= above - 1) {
            const int64_t e = first + __builtin_ctz(above);
            if (!(values[e] > best[top_k - 1])) continue;
            int64_t k = top_k - 1;
            for (; k > 0 && values[e] > best[k - 1]; k--) {
                best[k] = best[k - 1];
                ids[k] = ids[k - 1];
            }
            best[k] = values[e];
            ids[k] = e;
        }
    });
}

template <class T>
void route(const T *logits, int64_t stride, int64_t num_tokens, int64_t num_experts, int64_t top_k, bool renormalize,
           int64_t *ids, T *weights, int64_t threads) {
    parallel(num_tokens * num_experts < SERIAL_VALUES ? 1 : threads, [&](Team team) {
        const Range share = team.share(num_tokens);
        float values[MAX_EXPERTS], best[MAX_EXPERTS];
        for (int64_t t = share.begin; t < share.end; t++) {
            float total = exponentials(logits + t * stride, num_experts, values);
            select_best(values, num_experts, top_k, ids + t * top_k, best);
            if (renormalize) {
                total = 0.0f;
                for (int64_t k = 0; k < top_k; k++) total += best[k];
            }
            for (int64_t k = 0; k < top_k; k++) {
                const float weight = best[k] > LEAST_EXP ? best[k] / total : 0.0f;
                store_part(weights + t * top_k + k, broadcast(weight), 1);
            }
        }
    });
}

}  // namespace

MOE_EXPORT(void, moe_route)
(const void *logits, int64_t stride, int64_t num_tokens, int64_t num_experts, int64_t top_k, int64_t renormalize,
 int64_t *ids, void *weights, int64_t is_bf16, int64_t threads) {
    if (is_bf16) {
        route(static_cast<const bf16 *>(logits), stride, num_tokens, num_experts, top_k, renormalize != 0, ids,
              static_cast<bf16 *>(weights), threads);
    } else {
        route(static_cast<const float *>(logits), stride, num_tokens, num_experts, top_k, renormalize != 0, ids,
              static_cast<float *>(weights), threads);
    }
}
