/* The product of any number of rows of activations with a block of weights.
 *
 * Shape legend: T rows of activations, N rows of weights, K what the sums run over.
 */
#pragma once

#include "gemm_quads.h"
#include "gemm_tile.h"
#include "scratch.h"

namespace {

constexpr int64_t BLOCK = 32;       // rows of weights that go through the cache together
constexpr int64_t ROWS_CHUNK = 48;  // rows of activations whose sums are kept at once
/* From how many rows on it pays to convert weights once instead of in each tile, and to pack those that need no more. */
constexpr int64_t CONVERT_ROWS = 9, PACK_ROWS = 20;
/* How far ahead of their use weights are fetched at least: memory's latency times what a core reads in it, and more. */
constexpr int64_t AHEAD_BYTES = 8192;

template <class W, class X>
constexpr bool CONVERSION_PAYS = sizeof(W) == 1;
#ifndef __AVX512F__
template <>
constexpr bool CONVERSION_PAYS<bf16, float> = true;
#endif

/* From one row of a matrix to the next, in elements: an odd number of cache lines, so that the same column of
 * neighbouring rows lies in different sets of the cache. */
template <class X>
inline int64_t padded(int64_t depth) {
    constexpr int64_t line = LINE / static_cast<int64_t>(sizeof(X));
    return ((depth + line - 1) / line | 1) * line;
}

/* Copy a row of `depth` elements, with zeros after them. */
template <class From, class X>
inline void copy_row(const From *from, int64_t depth, X *to) {
    using L = Lanes<X>;
    int64_t k = 0;
    for (; k + L::STEP <= depth; k += L::STEP) L::write(to + k, L::read(from + k));
    if (k < depth) L::write(to + k, L::read_part(from + k, depth - k));
}

/* Up to BLOCK rows of weights, and how `num_rows` rows in all are multiplied with them. */
template <class W, class X>
class Block {
   public:
    /* What a block's converted or packed weights need. */
    static int64_t panel_size(int64_t depth) {
        if constexpr (Packed<X>::EXISTS) return Packed<X>::size(BLOCK, depth);
        return CONVERSION_PAYS<W, X> ? BLOCK * padded<X>(depth) : 0;
    }

    /* `next` are the weights that are wanted after these. */
    Block(const W *weights, int64_t count, int64_t depth, int64_t num_rows, X *panel, const W *next)
        : weights_(weights), next_(next), count_(count), depth_(depth) {
        if constexpr (Packed<X>::EXISTS) {
            if (num_rows < (CONVERSION_PAYS<W, X> ? CONVERT_ROWS : PACK_ROWS)) return;
            panel_ = panel;
            Packed<X>::pack(weights, count, depth, panel);
        } else if (CONVERSION_PAYS<W, X> && num_rows >= CONVERT_ROWS) {
            panel_ = panel;
            for (int64_t n = 0; n < count; n++) copy_row(weights + n * depth, depth, panel + n * padded<X>(depth));
        }
    }

    /* sums[t * sums_stride + n] = w_n . x_t; `sums` has room for whole tiles. */
    void multiply(const X *const *x, int64_t num_rows, float *sums, int64_t sums_stride) {
        if (!panel_)
            multiply_with<W>(weights_, depth_, x, num_rows, sums, sums_stride);
        else if constexpr (Packed<X>::EXISTS)
            Packed<X>::multiply(panel_, count_, depth_, x, num_rows, sums, sums_stride, next_);
        else
            multiply_with<X>(panel_, padded<X>(depth_), x, num_rows, sums, sums_stride);
    }

   private:
    template <class Weight>
    void multiply_with(const Weight *w, int64_t stride, const X *const *x, int64_t num_rows, float *sums,
                       int64_t sums_stride) {
        const int64_t at_once = num_rows <= RUN_ROWS ? RUN_ROWS : MAX_ROWS;
        for_parts(depth_, [&](Part part) {
            for_row_groups(num_rows, at_once, [&](int64_t row, int64_t rows) {
                const auto multiply = at_once == RUN_ROWS ? run_of<Weight>(rows) : tile_of<Weight>(rows);
                multiply_rows(multiply, w, stride, part, x + row, sums + row * sums_stride, sums_stride);
            });
        });
    }

    template <class Weight>
    using Multiply = void (*)(const Weight *const *, const X *const *, Part, float *, int64_t, const char *);

    /* A step takes a sum's latency in a run: with few bytes a step, memory would wait for that. */
    template <class Weight, int R>
    static constexpr Multiply<Weight> of_few() {
        if constexpr (R <= MAX_ROWS && sizeof(Weight) * Lanes<X>::STEP < 16)
            return tile<Weight, X, R, sizeof(W)>;
        else
            return run<Weight, X, R>;
    }

    template <class Weight>
    static Multiply<Weight> run_of(int64_t rows) {
        constexpr Multiply<Weight> runs[] = {of_few<Weight, 1>(), of_few<Weight, 2>(), of_few<Weight, 3>(),
                                             of_few<Weight, 4>(), of_few<Weight, 5>(), of_few<Weight, 6>(),
                                             of_few<Weight, 7>(), of_few<Weight, 8>()};
        static_assert(sizeof runs / sizeof *runs == RUN_ROWS);
        return runs[rows - 1];
    }

    template <class Weight>
    static Multiply<Weight> tile_of(int64_t rows) {
        constexpr size_t size = sizeof(W);
        constexpr Multiply<Weight> tiles[] = {
            tile<Weight, X, 1, size>, tile<Weight, X, 2, size>, tile<Weight, X, 3, size>,
#ifdef __AVX512F__
            tile<Weight, X, 4, size>, tile<Weight, X, 5, size>, tile<Weight, X, 6, size>,
#endif
        };
        static_assert(sizeof tiles / sizeof *tiles == MAX_ROWS);
        return tiles[rows - 1];
    }

    template <class Weight>
    void multiply_rows(Multiply<Weight> multiply, const Weight *w, int64_t stride, Part part, const X *const *x,
                       float *sums, int64_t sums_stride) {
        for (int64_t first = 0; first < count_; first += N) {
            const Weight *columns[N];
            for (int64_t n = 0; n < N; n++)  // past the end the last one again: those sums are never read
                columns[n] = w + (first + n < count_ ? first + n : count_ - 1) * stride;
            multiply(columns, x, part, sums + first, sums_stride, ahead_of(first, part));
        }
    }

    /* What to prefetch while the rows from `first` on are multiplied: rows further on, or, where this block's have been
     * converted, as many of the next block's. An address past the end does no harm. */
    const char *ahead_of(int64_t first, Part part) const {
        const int64_t tile_bytes = N * (depth_ ? depth_ : 1) * static_cast<int64_t>(sizeof(W));
        const int64_t row = first + (panel_ ? count_ : N * ((AHEAD_BYTES + tile_bytes - 1) / tile_bytes));
        const W *at = row < count_ ? weights_ + row * depth_ : next_ + (row - count_) * depth_;
        return reinterpret_cast<const char *>(at + N * part.offset);
    }

    const W *weights_, *next_;
    int64_t count_, depth_;
    const X *panel_ = nullptr;
};

/* Element types as the caller numbers them. */
enum Type : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

/* Calls `body(W{}, X{})`: the weights' type, and the type that activations are multiplied in. */
template <class Body>
inline void with_types(int64_t weight_type, [[maybe_unused]] int64_t activation_type, const Body &body) {
#ifdef __AVX512BF16__
    if (activation_type == BFLOAT16 && weight_type == BFLOAT16) return body(bf16{}, bf16{});
    if (activation_type == BFLOAT16 && weight_type == INT8) return body(int8_t{}, bf16{});
#endif
    if (weight_type == BFLOAT16) return body(bf16{}, float{});
    if (weight_type == INT8) return body(int8_t{}, float{});
    return body(float{}, float{});
}

}  // namespace
