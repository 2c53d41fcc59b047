/* The product of a few rows of activations with a few rows of weights: what every matrix product here is made of.
 *
 * Weights lie as in a checkpoint, [N, K], and so do activations, [T, K]: both are contiguous along the sum's index.
 * So a tile's accumulators are vectors over K, and are summed across their lanes once, at the end. Nothing is
 * transposed, and a weight can be read where it lies.
 */
#pragma once

#include "simd.h"

namespace {

constexpr int64_t BURST = 4;  // steps between two rounds of prefetching
/* Prefetched into the second level: a core has too few places for lines on their way to the first to keep memory busy. */
constexpr auto INTO_CACHE = _MM_HINT_T1;

/* How activations of type X, in registers, are multiplied with weights of any type. */
template <class X>
struct Lanes;

template <>
struct Lanes<float> {
    using Register = vec;
    static constexpr int64_t STEP = WIDTH;
    template <class W>
    static vec read(const W *p) {
        return load(p);
    }
    template <class W>
    static vec read_part(const W *p, int64_t count) {
        return load_part(p, count);
    }
    static void write(float *p, vec a) { store(p, a); }
    static vec multiply_add(vec w, vec x, vec sum) { return fma(w, x, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Lanes<bf16> {
    using Register = __m512i;
    static constexpr int64_t STEP = 2 * WIDTH;
    static __m512i read(const bf16 *p) { return _mm512_loadu_si512(p); }
    static __m512i read_part(const bf16 *p, int64_t count) {
        return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
    }
    /* Codes have so few bits that the upper half of a float32 holds them. */
    static __m512i read(const int8_t *p) {
        const __m512i first = _mm512_castps_si512(load(p)), second = _mm512_castps_si512(load(p + WIDTH));
        return _mm512_permutex2var_epi16(first, upper_halves(), second);
    }
    static __m512i read_part(const int8_t *p, int64_t count) {
        int8_t whole[STEP] = {};
        memcpy(whole, p, static_cast<size_t>(count));
        return read(whole);
    }
    static void write(bf16 *p, __m512i a) { _mm512_storeu_si512(p, a); }
    static vec multiply_add(__m512i w, __m512i x, vec sum) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
    }

   private:
    static __m512i upper_halves() {
        const __m512i even = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12,
                                              11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        return _mm512_add_epi16(_mm512_add_epi16(even, even), _mm512_set1_epi16(1));
    }
};
#endif

/* Tiles have N rows of weights and at most MAX_ROWS of activations, so that sums and weights fit the registers. Up to
 * RUN_ROWS rows of activations are multiplied with one row of weights at a time. */
constexpr int RUN_ROWS = 8;
#ifdef __AVX512F__
constexpr int N = 4, MAX_ROWS = 6;
#else
constexpr int N = 4, MAX_ROWS = 3;
#endif

/* Sums are cut here however many rows there are, so that a row's result does not depend on the rows beside it. */
constexpr int64_t DEPTH = 2048;

/* Which elements of the rows are multiplied. */
struct Part {
    int64_t offset, depth;
};

/* Calls `body(part)` for each part of a sum: at least one. */
template <class Body>
inline void for_parts(int64_t depth, const Body &body) {
    for (int64_t offset = 0; offset == 0 || offset < depth; offset += DEPTH)
        body(Part{offset, depth - offset < DEPTH ? depth - offset : DEPTH});
}

/* Write, or add if the part is not the first, sums[r * sums_stride + n], whose lanes are in sum[r][n]. */
template <int R>
inline void write_sums(const vec (*sum)[N], Part part, float *sums, int64_t sums_stride) {
    for (int r = 0; r < R; r++) {
        const __m128 across = sum_four(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        float *out = sums + r * sums_stride;
        _mm_storeu_ps(out, part.offset ? across + _mm_loadu_ps(out) : across);
    }
}

/* sums[r * sums_stride + n] = w[n] . x[r] over a part, added to what is there unless the part is the first.
 * Activations are readable, and zero, up to a multiple of the step; weights end where they end. From `ahead` on, as much is
 * prefetched as is read, of elements of AHEAD_SIZE bytes.
 *
 * N rows of weights are read side by side, for many rows of activations: each that is in a register is used often. */
template <class W, class X, int R, size_t AHEAD_SIZE>
inline void tile(const W *const *w, const X *const *x, Part part, float *sums, int64_t sums_stride,
                 const char *ahead) {
    using L = Lanes<X>;
    constexpr auto BURST_BYTES = N * static_cast<int64_t>(AHEAD_SIZE) * BURST * L::STEP;
    vec sum[R][N];
    const X *row[R];
    const W *column[N];
    for (int r = 0; r < R; r++) row[r] = x[r] + part.offset;
    for (int n = 0; n < N; n++) column[n] = w[n] + part.offset;
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sum[r][n] = zero();

    const auto multiply = [&](const typename L::Register *weight, int64_t k) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const typename L::Register activation = L::read(row[r] + k);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) sum[r][n] = L::multiply_add(weight[n], activation, sum[r][n]);
        }
    };
    const auto step = [&](int64_t k) {
        typename L::Register weight[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) weight[n] = L::read(column[n] + k);
        multiply(weight, k);
    };
    int64_t k = 0;
    for (; k + BURST * L::STEP <= part.depth; k += BURST * L::STEP, ahead += BURST_BYTES) {
        for (int64_t byte = 0; byte < BURST_BYTES; byte += LINE) _mm_prefetch(ahead + byte, INTO_CACHE);
#pragma GCC unroll 4
        for (int64_t i = 0; i < BURST; i++) step(k + i * L::STEP);
    }
    for (; k + L::STEP <= part.depth; k += L::STEP) step(k);
    if (k < part.depth) {
        typename L::Register weight[N];
        for (int n = 0; n < N; n++) weight[n] = L::read_part(column[n] + k, part.depth - k);
        multiply(weight, k);
    }
    write_sums<R>(sum, part, sums, sums_stride);
}

/* Whether the line is one of the first of its page: as many as a core needs to see that it is read in order. */
inline bool starts_page(const char *line) {
    constexpr uintptr_t PAGE = 4096;
    return reinterpret_cast<uintptr_t>(line) % PAGE < 4 * LINE;
}

/* The same for few rows of activations, where memory is what takes the time: rows of weights are read one after another, as
 * one run. Each sum is made in the order in which a tile makes it. */
template <class W, class X, int R>
inline void run(const W *const *w, const X *const *x, Part part, float *sums, int64_t sums_stride, const char *ahead) {
    using L = Lanes<X>;
    constexpr int64_t STEP_BYTES = static_cast<int64_t>(sizeof(W)) * L::STEP;
    /* With fewer rows the core runs ahead by itself as far as memory allows, though not from one page into the next. */
    constexpr bool PREFETCHES = R > 2;
    vec sum[R][N];
    const X *row[R];
    for (int r = 0; r < R; r++) row[r] = x[r] + part.offset;
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        const W *column = w[n] + part.offset;
        vec own[R];
        for (int r = 0; r < R; r++) own[r] = zero();
        int64_t k = 0;
#pragma GCC unroll 4
        for (; k + L::STEP <= part.depth; k += L::STEP, ahead += STEP_BYTES) {
            if (PREFETCHES || starts_page(ahead)) _mm_prefetch(ahead, INTO_CACHE);
            const typename L::Register weight = L::read(column + k);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) own[r] = L::multiply_add(weight, L::read(row[r] + k), own[r]);
        }
        if (k < part.depth) {
            const typename L::Register weight = L::read_part(column + k, part.depth - k);
            for (int r = 0; r < R; r++) own[r] = L::multiply_add(weight, L::read(row[r] + k), own[r]);
        }
        for (int r = 0; r < R; r++) sum[r][n] = own[r];
    }
    write_sums<R>(sum, part, sums, sums_stride);
}

}  // namespace
