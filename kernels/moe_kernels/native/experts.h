/* What a call of the experts is given, and its choices sorted by expert.
 *
 * Shape legend: G tokens, K choices of each, L local experts, H hidden, F expert intermediate. A pair is one token with
 * one of its local experts; pairs are sorted by expert, and within one by token.
 */
#pragma once

#include "scratch.h"
#include "simd.h"
#include "threads.h"

namespace {

struct Sizes {
    int64_t G, K, L, H, F;
};

inline int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

/* Columns of H that a thread computes for all experts before it takes others: many, as an expert's rows for them are one
 * run through memory, but with sums that stay in a core's cache, and enough runs for all threads; a multiple of `step`. */
inline int64_t columns_at_once(int64_t hidden, int64_t num_tokens, int64_t num_threads, int64_t step) {
    constexpr int64_t SUMS = 1 << 16, RUNS_A_THREAD = 2;
    const int64_t for_cache = SUMS / (num_tokens ? num_tokens : 1);
    const int64_t for_threads = num_threads > 1 ? hidden / (RUNS_A_THREAD * num_threads) : hidden;
    const int64_t columns = at_most(at_most(for_cache, for_threads), hidden);
    return blocks_of(columns ? columns : 1, step) * step;
}

/* The next of a counter that threads share. */
inline int64_t claim(int64_t &next) { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }

/* Both weights of all experts; scales are null, or a factor for each row. */
template <class W>
struct Experts {
    const W *gate_up, *down;
    const float *gate_up_scale, *down_scale;
};

/* The tokens of each expert. */
struct Pairs {
    int64_t *first;   // of each expert, and one past the last; [L + 1]
    int64_t *active;  // experts that have pairs, ascending; [L]
    int32_t *token;   // of each pair
    float *weight;    // of each pair
    int64_t num_active;

    static int64_t size_of(const Sizes &size, int64_t num_pairs) {
        return Scratch::size_of<int64_t>(size.L + 1) + Scratch::size_of<int64_t>(size.L) +
               Scratch::size_of<int32_t>(num_pairs) + Scratch::size_of<float>(num_pairs);
    }

    void take(Scratch &from, const Sizes &size, int64_t num_pairs) {
        first = from.take<int64_t>(size.L + 1);
        active = from.take<int64_t>(size.L);
        token = from.take<int32_t>(num_pairs);
        weight = from.take<float>(num_pairs);
    }

    /* Counting sort. */
    template <class Y>
    void sort(const int64_t *ids, const Y *weights, int64_t num_tokens, const Sizes &size) {
        memset(first, 0, static_cast<size_t>(size.L + 1) * sizeof(int64_t));
        for (int64_t i = 0; i < num_tokens * size.K; i++)
            if (ids[i] >= 0) first[ids[i]]++;
        int64_t end = 0;
        num_active = 0;
        for (int64_t expert = 0; expert < size.L; expert++) {
            if (first[expert]) active[num_active++] = expert;
            end += first[expert];
            first[expert] = end;
        }
        first[size.L] = end;
        for (int64_t i = num_tokens * size.K - 1; i >= 0; i--) {  // backwards, as each expert is filled from its end
            if (ids[i] < 0) continue;
            const int64_t pair = --first[ids[i]];
            token[pair] = static_cast<int32_t>(i / size.K);
            weight[pair] = as_float(weights[i]);
        }
    }
};

}  // namespace
