/* Attention of a few rows: ROWS queries of D values with KEYS keys at a time, as float32, with a running softmax.
 *
 * For many rows keys and values are widened once, into the first two levels of cache. For few, as a decode has, they are
 * widened in registers, and what comes next is fetched meanwhile, as memory is what takes the time. A sum is made in the same
 * order in both, to the same bits.
 */
#pragma once

#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t ROWS = 32, KEYS = 16, MAX_HEAD = 256;
constexpr int KEYS_AT_ONCE = 4, ROWS_AT_ONCE = 4;  // whose products are summed in registers
#ifdef __AVX512F__
constexpr int VALUES_AT_ONCE = 16;  // vectors of sums of values in registers
#else
constexpr int VALUES_AT_ONCE = 8;
#endif

struct Work {
    float q[ROWS * MAX_HEAD], out[ROWS * MAX_HEAD];
    float k[KEYS * MAX_HEAD], v[KEYS * MAX_HEAD];
    float scores[ROWS * KEYS], largest[ROWS], total[ROWS];
};

/* `size` values, zeros after them up to whole vectors. */
template <class T>
inline void widen(const T *from, int64_t size, float factor, float *to) {
    for (int64_t c = 0; c < size; c += WIDTH)
        store(to + c, load_first(from + c, size - c < WIDTH ? size - c : WIDTH) * broadcast(factor));
}

/* Keys and values where they lie. */
template <class T>
struct InPlace {
    using Value = T;
    static constexpr bool FETCHES = true;
};

/* Copies of them as float32. */
struct Widened {
    using Value = float;
    static constexpr bool FETCHES = false;
};

/* KEYS keys and their values: those past the last are the last one's. */
template <class Value>
struct Places {
    const Value *k[KEYS], *v[KEYS];
};

/* Fetch what is wanted after a vector of values from `column` on, if it is a line's first. */
template <class From>
inline void fetch(const typename From::Value *after, int64_t column) {
    if (From::FETCHES && column * static_cast<int64_t>(sizeof *after) % LINE == 0)
        _mm_prefetch(reinterpret_cast<const char *>(after + column), _MM_HINT_T1);
}

/* scores[R, K] of R rows and KEYS_AT_ONCE keys. */
template <class From, int R>
inline void dot_block(const float *q, const typename From::Value *const *keys, const typename From::Value *const *after,
                      int64_t stride, float *scores) {
    vec sums[R][KEYS_AT_ONCE] = {};
    for (int64_t d = 0; d < stride; d += WIDTH) {
        vec key[KEYS_AT_ONCE];
#pragma GCC unroll 4
        for (int j = 0; j < KEYS_AT_ONCE; j++) {
            fetch<From>(after[j], d);
            key[j] = load(keys[j] + d);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const vec query = load(q + r * stride + d);
#pragma GCC unroll 4
            for (int j = 0; j < KEYS_AT_ONCE; j++) sums[r][j] = fma(query, key[j], sums[r][j]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
        _mm_storeu_ps(scores + r * KEYS, sum_four(sums[r][0], sums[r][1], sums[r][2], sums[r][3]));
}

/* out += scores v, for COLUMNS vectors of R rows. */
template <class From, int R, int COLUMNS>
inline void add_columns(const float *scores, const typename From::Value *const *values,
                        const typename From::Value *const *after, int64_t column, int64_t num_keys, float *out,
                        int64_t stride) {
    vec sums[R][COLUMNS];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int c = 0; c < COLUMNS; c++) sums[r][c] = load(out + r * stride + column + c * WIDTH);
    for (int64_t j = 0; j < num_keys; j++) {
        vec value[COLUMNS];
#pragma GCC unroll 16
        for (int c = 0; c < COLUMNS; c++) {
            fetch<From>(after[j] + column, c * WIDTH);
            value[c] = load(values[j] + column + c * WIDTH);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const vec weight = broadcast(scores[r * KEYS + j]);
#pragma GCC unroll 16
            for (int c = 0; c < COLUMNS; c++) sums[r][c] = fma(weight, value[c], sums[r][c]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int c = 0; c < COLUMNS; c++) store(out + r * stride + column + c * WIDTH, sums[r][c]);
}

template <class From, int R>
inline void value_block(const float *scores, const typename From::Value *const *values,
                        const typename From::Value *const *after, int64_t num_keys, float *out, int64_t stride) {
    constexpr int COLUMNS = R == 1 ? 8 : VALUES_AT_ONCE / R;
    int64_t d = 0;
    for (; d + COLUMNS * WIDTH <= stride; d += COLUMNS * WIDTH)
        add_columns<From, R, COLUMNS>(scores, values, after, d, num_keys, out, stride);
    for (; d < stride; d += WIDTH) add_columns<From, R, 1>(scores, values, after, d, num_keys, out, stride);
}

/* The softmax of a row so far, with KEYS more scores, which become weights; scales what the row has summed. */
inline void soften(Work &work, int64_t row, int64_t allowed, int64_t stride) {
    float *scores = work.scores + row * KEYS;
    for (int64_t j = allowed < 0 ? 0 : allowed; j < KEYS; j++) scores[j] = -__builtin_inff();
    float highest = work.largest[row];
    for (int64_t j = 0; j < KEYS; j += WIDTH) {
        const float more = largest(load(scores + j));
        highest = more > highest ? more : highest;
    }
    if (highest == -__builtin_inff()) {  // nothing yet that this row may see
        for (int64_t j = 0; j < KEYS; j++) scores[j] = 0.0f;
        return;
    }
    const float kept = __builtin_expf(work.largest[row] - highest);
    vec added = zero();
    for (int64_t j = 0; j < KEYS; j += WIDTH) {
        const vec weights = exp(load(scores + j) - broadcast(highest));
        store(scores + j, weights);
        added += weights;
    }
    // Where a key may not be seen, e^-inf has to be nothing at all, not the smallest that `exp` returns.
    for (int64_t j = allowed < 0 ? 0 : allowed; j < KEYS; j++) scores[j] = 0.0f;
    work.total[row] = work.total[row] * kept + sum(added);
    work.largest[row] = highest;
    if (kept != 1.0f)
        for (int64_t d = 0; d < stride; d += WIDTH)
            store(work.out + row * stride + d, load(work.out + row * stride + d) * broadcast(kept));
}

/* `rows` of work with `count` keys, of which the first token may see `seen`, each further one one more. */
template <class From>
inline void attend_keys(Work &work, const Places<typename From::Value> &at, const Places<typename From::Value> &next,
                        int64_t count, int64_t seen, int64_t rows, int64_t group, int64_t stride) {
    constexpr decltype(&dot_block<From, 1>) dots[] = {dot_block<From, 1>, dot_block<From, 2>, dot_block<From, 3>,
                                                      dot_block<From, 4>};
    constexpr decltype(&value_block<From, 1>) adds[] = {value_block<From, 1>, value_block<From, 2>, value_block<From, 3>,
                                                        value_block<From, 4>};
    for_row_groups(rows, ROWS_AT_ONCE, [&](int64_t r, int64_t num_rows) {
        for (int64_t j = 0; j < KEYS; j += KEYS_AT_ONCE)
            dots[num_rows - 1](work.q + r * stride, at.k + j, at.v + j, stride, work.scores + r * KEYS + j);
    });
    for (int64_t r = 0; r < rows; r++) soften(work, r, at_most(seen + r / group, count), stride);
    for_row_groups(rows, ROWS_AT_ONCE, [&](int64_t r, int64_t num_rows) {
        adds[num_rows - 1](work.scores + r * KEYS, at.v, next.k, count, work.out + r * stride, stride);
    });
}

/* Copies in work, of values of the first `count` alone: others have no weight. */
template <class T>
inline Places<float> widened(const Places<T> &at, int64_t count, int64_t size, int64_t stride, Work &work) {
    Places<float> found;
    for (int64_t j = 0; j < KEYS; j++) {
        found.k[j] = work.k + j * stride;
        found.v[j] = work.v + j * stride;
        widen(at.k[j], size, 1.0f, work.k + j * stride);
        if (j < count) widen(at.v[j], size, 1.0f, work.v + j * stride);
    }
    return found;
}

}  // namespace
