/* The products of many rows of activations in bfloat16: four rows of weights share a vector.
 *
 * With a row of weights to a vector, as in gemm_tile.h, each sum is spread over all lanes, and adding those up costs short
 * rows as much as multiplying them. Here weights are put together once for all rows of activations, so that a vector has a
 * piece of each of four rows, and sums of four lanes are added up, a quarter of the work: pieces that a tile of gemm_tile.h
 * has in different lanes are summed one after the other, and a sum is made in the same order, to the same bits.
 *
 * Shape legend: T rows of activations, N rows of weights, K what the sums run over.
 */
#pragma once

#include "gemm_tile.h"

namespace {

/* A block of weights, put together for activations of type X; not for every type. */
template <class X>
struct Packed {
    static constexpr bool EXISTS = false;
};

#ifdef __AVX512BF16__

constexpr int64_t QUAD = 4;   // rows of weights in a vector
constexpr int64_t PIECE = 8;  // elements of each of them
constexpr int64_t PIECES = Lanes<bf16>::STEP / PIECE;
constexpr int64_t QUADS = 4;  // whose sums fill a vector
constexpr int64_t PACKED_ROWS = QUADS * QUAD;

/* From four pieces of each of four rows to a vector for each piece. */
inline void transpose_pieces(__m512i (&v)[QUAD]) {
    const __m512i low = _mm512_shuffle_i32x4(v[0], v[1], 0x44), low_2 = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
    const __m512i high = _mm512_shuffle_i32x4(v[0], v[1], 0xee), high_2 = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    v[0] = _mm512_shuffle_i32x4(low, low_2, 0x88);
    v[1] = _mm512_shuffle_i32x4(low, low_2, 0xdd);
    v[2] = _mm512_shuffle_i32x4(high, high_2, 0x88);
    v[3] = _mm512_shuffle_i32x4(high, high_2, 0xdd);
}

/* Elements of PACKED_ROWS rows of weights when they are put together. */
inline int64_t packed_size(int64_t depth) {
    constexpr int64_t step = Lanes<bf16>::STEP;
    return (depth + step - 1) / step * step * PACKED_ROWS;
}

/* Put PACKED_ROWS rows of weights together: [PIECES][K / STEP][QUADS][QUAD][PIECE], with zeros up to a multiple of the
 * step. */
template <class W>
inline void pack_quads(const W *const *w, Part part, bf16 *to) {
    using L = Lanes<bf16>;
    const int64_t pass_size = packed_size(part.depth) / PIECES;
    for (int64_t k = 0; k < part.depth; k += L::STEP, to += PACKED_ROWS * PIECE) {
#pragma GCC unroll 4
        for (int64_t q = 0; q < QUADS; q++) {
            __m512i rows[QUAD];
#pragma GCC unroll 4
            for (int64_t n = 0; n < QUAD; n++) {
                const W *from = w[q * QUAD + n] + part.offset + k;
                rows[n] = k + L::STEP <= part.depth ? L::read(from) : L::read_part(from, part.depth - k);
            }
            transpose_pieces(rows);
#pragma GCC unroll 4
            for (int64_t piece = 0; piece < PIECES; piece++)
                L::write(to + piece * pass_size + q * QUAD * PIECE, rows[piece]);
        }
    }
}

/* sums[r * sums_stride + n] = w[n] . x[r] for packed weights, as `tile` makes them. In each step a line is prefetched from
 * `ahead` on. */
template <int R>
inline void quads(const bf16 *packed, const bf16 *const *x, Part part, float *sums, int64_t sums_stride,
                  const char *ahead) {
    using L = Lanes<bf16>;
    vec of_piece[PIECES][R];  // sums so far: [row of a quad][quad]
    const bf16 *row[R];
    for (int r = 0; r < R; r++) row[r] = x[r] + part.offset;
#pragma GCC unroll 1
    for (int64_t piece = 0; piece < PIECES; piece++) {
        vec sum[R][QUADS];
        for (int r = 0; r < R; r++)
            for (int q = 0; q < QUADS; q++) sum[r][q] = zero();
#pragma GCC unroll 4
        for (int64_t k = 0; k < part.depth; k += L::STEP, packed += PACKED_ROWS * PIECE, ahead += LINE) {
            _mm_prefetch(ahead, INTO_CACHE);
            __m512i weight[QUADS];
#pragma GCC unroll 4
            for (int q = 0; q < QUADS; q++) weight[q] = _mm512_loadu_si512(packed + q * QUAD * PIECE);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const auto *at = reinterpret_cast<const __m128i *>(row[r] + k + piece * PIECE);
                const __m512i activation = _mm512_broadcast_i32x4(_mm_loadu_si128(at));
#pragma GCC unroll 4
                for (int q = 0; q < QUADS; q++) sum[r][q] = L::multiply_add(weight[q], activation, sum[r][q]);
            }
        }
        for (int r = 0; r < R; r++) of_piece[piece][r] = sum_in_fours(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
    }
    const __m512i by_row = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    for (int r = 0; r < R; r++) {
        const vec across = (of_piece[0][r] + of_piece[2][r]) + (of_piece[1][r] + of_piece[3][r]);
        const vec ordered = _mm512_permutexvar_ps(by_row, across);
        float *out = sums + r * sums_stride;
        store(out, part.offset ? ordered + load(out) : ordered);
    }
}

template <>
struct Packed<bf16> {
    static constexpr bool EXISTS = true;

    /* In elements, for a multiple of PACKED_ROWS rows. */
    static int64_t size(int64_t num_weights, int64_t depth) { return num_weights / PACKED_ROWS * packed_size(depth); }

    template <class W>
    static void pack(const W *weights, int64_t count, int64_t depth, bf16 *packed) {
        for_parts(depth, [&](Part part) {
            for (int64_t first = 0; first < count; first += PACKED_ROWS, packed += packed_size(part.depth)) {
                const W *rows[PACKED_ROWS];
                for (int64_t n = 0; n < PACKED_ROWS; n++)  // past the end the last one again, as for a tile
                    rows[n] = weights + (first + n < count ? first + n : count - 1) * depth;
                pack_quads(rows, part, packed);
            }
        });
    }

    /* `next` are the weights that are wanted after these. */
    template <class W>
    static void multiply(const bf16 *packed, int64_t count, int64_t depth, const bf16 *const *x, int64_t num_rows,
                         float *sums, int64_t sums_stride, const W *next) {
        constexpr decltype(&quads<1>) tiles[] = {quads<1>, quads<2>, quads<3>, quads<4>, quads<5>, quads<6>};
        static_assert(sizeof tiles / sizeof *tiles == MAX_ROWS);
        for_parts(depth, [&](Part part) {
            // Four groups of rows take as many steps as weights have lines.
            const int64_t quarter = packed_size(part.depth) / QUADS * static_cast<int64_t>(sizeof(bf16));
            for (int64_t first = 0; first < count; first += PACKED_ROWS, packed += packed_size(part.depth)) {
                const W *wanted = next + first * depth + PACKED_ROWS * part.offset;
                int64_t group = 0;
                for_row_groups(num_rows, MAX_ROWS, [&](int64_t row, int64_t rows) {
                    tiles[rows - 1](packed, x + row, part, sums + row * sums_stride + first, sums_stride,
                                    reinterpret_cast<const char *>(wanted) + group++ % QUADS * quarter);
                });
            }
        });
    }
};

#endif

}  // namespace
