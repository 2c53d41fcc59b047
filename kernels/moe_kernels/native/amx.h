/* Products on AMX tiles: 16 rows of weights by up to 16 rows of activations, 32 elements deep, at a time.
 *
 * Weights are the left operand, so that tiles load them where they lie, [N, K]. Activations are the right one, which
 * wants pairs of elements side by side: they are packed once, and then read by every block of weights. A sum runs over
 * k in one order whatever rows are beside it, so that a row's result does not depend on them.
 */
#pragma once

#ifdef __AMX_BF16__

#include "gemm_tile.h"

namespace {

constexpr int64_t TILE = 16;        // rows of weights or of activations
constexpr int64_t TILE_DEPTH = 32;  // elements of a row
constexpr int64_t STAGED_TILES = 4;
/* Short rows end before the hardware has seen where they lead: up to this depth, rows further on are fetched ahead. */
constexpr int64_t FETCH_DEPTH = 512, FETCH_ROWS = 4 * TILE;

inline int64_t tiled(int64_t depth) { return (depth + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH; }

/* Transpose 16 x 16 elements of 32 bits. */
inline void transpose(__m512i (&rows)[TILE]) {
    __m512i half[TILE];
    for (int i = 0; i < TILE; i += 2) {
        half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < TILE; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        half[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        half[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        half[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        half[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        rows[i] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0xdd);
    }
}

/* Up to TILE rows of activations: at [k / 2][row] the elements k and k + 1, zero from the depth on to `tiled` of it. */
struct Group {
    const uint32_t *pairs;
    int64_t rows;
};

/* Pack rows of `depth` elements into tiled(depth) / 2 * num_rows pairs. */
inline void pack(const bf16 *const *rows, int64_t num_rows, int64_t depth, uint32_t *pairs) {
    using L = Lanes<bf16>;
    const __mmask16 lanes = first_lanes(num_rows);
    for (int64_t k = 0; k < depth; k += TILE_DEPTH) {
        const int64_t count = depth - k < TILE_DEPTH ? depth - k : TILE_DEPTH;
        __m512i block[TILE];
        for (int64_t r = 0; r < TILE; r++) block[r] = r < num_rows ? L::read_part(rows[r] + k, count) : __m512i{};
        if (num_rows == 1) {
            _mm512_storeu_si512(pairs, block[0]);
        } else {
            transpose(block);
            for (int64_t p = 0; p < TILE; p++) _mm512_mask_storeu_epi32(pairs + p * num_rows, lanes, block[p]);
        }
        pairs += TILE * num_rows;
    }
}

/* Sums of two tiles of weights with up to two groups: [TILE][rows of the group]. */
struct Sums {
    alignas(LINE) float of[2][2][TILE * TILE];  // [tile of weights][group]

    /* The sums of 16 rows of weights for each row of a group: the transpose. */
    void by_row(int64_t weights, int64_t group, int64_t num_rows, vec (&rows)[TILE]) const {
        const float *sums = of[weights][group];
        if (num_rows == 1) {
            rows[0] = load(sums);
            return;
        }
        __m512i block[TILE];
        for (int64_t n = 0; n < TILE; n++)
            block[n] = _mm512_maskz_loadu_epi32(first_lanes(num_rows), sums + n * num_rows);
        transpose(block);
        for (int64_t r = 0; r < TILE; r++) rows[r] = _mm512_castsi512_ps(block[r]);
    }
};

/* Two tiles of weights: `count` rows from `at`, [count, depth]. */
template <class W>
struct WeightTiles {
    const W *at[2];
    int64_t count[2], depth;

    /* `num_rows` rows that lie one after the other, at most two tiles of them. */
    static WeightTiles of_run(const W *w, int64_t num_rows, int64_t depth) {
        const int64_t second = num_rows > TILE ? num_rows - TILE : 0;
        return {{w, second ? w + TILE * depth : w}, {num_rows - second, second}, depth};
    }
};

/* Calls `body(groups, number of groups, first row)` for rows packed in groups of TILE, two groups at a time; `half` is
 * the pairs of a packed row. */
template <class Body>
inline void for_groups(const uint32_t *packed, int64_t num_rows, int64_t half, const Body &body) {
    for (int64_t row = 0; row < num_rows; row += 2 * TILE) {
        const int64_t left = num_rows - row, first = left < TILE ? left : TILE;
        const int64_t second = left - first < TILE ? left - first : TILE;
        const Group groups[2] = {{packed + row * half, first}, {packed + (row + first) * half, second}};
        body(groups, second ? 2 : 1, row);
    }
}

/* A thread's tiles: 0 to 3 the sums [weights][group], 4 and 5 the weights, 6 and 7 the groups. */
class Tiles {
   public:
    Sums sums;  // of the last product

    ~Tiles() {
        if (rows_[0]) _tile_release();
    }

    /* Calls `body(row, tile of weights, sums with its rows of weights)` for each row after a product. `scale` may be
     * null, or is a factor for each row of weights that lie one after the other. */
    template <class W, class Body>
    void for_rows(const WeightTiles<W> &weights, const Group *groups, int64_t num_groups, const float *scale,
                  const Body &body) const {
        for (int64_t g = 0; g < num_groups; g++) {
            for (int64_t half = 0; half < 2; half++) {
                vec rows[TILE];
                sums.by_row(half, g, groups[g].rows, rows);
                for (int64_t r = 0; r < groups[g].rows; r++)
                    body(g * TILE + r, half,
                         scale ? rows[r] * load_part(scale + half * TILE, weights.count[half]) : rows[r]);
            }
        }
    }

    template <class W>
    void multiply(const WeightTiles<W> &weights, const Group *groups, int64_t num_groups) {
        configure(groups[0].rows, num_groups > 1 ? groups[1].rows : 0);
        if (num_groups > 1)
            multiply_groups<W, 2>(weights, groups);
        else
            multiply_groups<W, 1>(weights, groups);
    }

   private:
    struct alignas(LINE) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};  // of a tile's row
        uint8_t rows[16] = {};
    };

    void configure(int64_t first, int64_t second) {
        if (rows_[0] == first && rows_[1] == second) return;
        rows_[0] = first;
        rows_[1] = second;
        Config config;
        const int64_t columns[8] = {first, second, first, second, TILE, TILE, first, second};
        for (int i = 0; i < 8; i++) {
            if (!columns[i]) continue;
            config.bytes[i] = static_cast<uint16_t>(4 * columns[i]);
            config.rows[i] = TILE;
        }
        _tile_loadconfig(&config);
    }

    template <class W, int GROUPS>
    void multiply_groups(const WeightTiles<W> &weights, const Group *groups) {
        _tile_zero(0);
        _tile_zero(2);
        if constexpr (GROUPS == 2) {
            _tile_zero(1);
            _tile_zero(3);
        }
        int64_t k = 0;
        if constexpr (sizeof(W) == sizeof(bf16)) {
            const int64_t whole = weights.count[0] == TILE && weights.count[1] == TILE ? weights.depth : 0;
            for (; k + TILE_DEPTH <= whole; k += TILE_DEPTH) {
                if (whole <= FETCH_DEPTH) fetch(weights, k);
                step<GROUPS>(weights.at[0] + k, weights.at[1] + k, weights.depth, groups, k);
            }
        }
        alignas(LINE) bf16 staged[2][TILE * STAGED_TILES * TILE_DEPTH];
        for (; k < weights.depth; k += STAGED_TILES * TILE_DEPTH) {
            for (int i = 0; i < 2; i++) stage(weights.at[i], weights.count[i], weights.depth, k, staged[i]);
            for (int64_t at = 0; at < STAGED_TILES * TILE_DEPTH && k + at < weights.depth; at += TILE_DEPTH)
                step<GROUPS>(staged[0] + at, staged[1] + at, STAGED_TILES * TILE_DEPTH, groups, k + at);
        }
        const auto row_bytes = [&](int group) { return static_cast<size_t>(groups[group].rows) * sizeof(float); };
        _tile_stored(0, sums.of[0][0], row_bytes(0));
        _tile_stored(2, sums.of[1][0], row_bytes(0));
        if constexpr (GROUPS == 2) {
            _tile_stored(1, sums.of[0][1], row_bytes(1));
            _tile_stored(3, sums.of[1][1], row_bytes(1));
        }
    }

    template <int GROUPS>
    static void step(const bf16 *first, const bf16 *second, int64_t stride, const Group *groups, int64_t k) {
        const auto bytes = static_cast<size_t>(stride) * sizeof(bf16);
        _tile_loadd(4, first, bytes);
        _tile_loadd(6, groups[0].pairs + k / 2 * groups[0].rows, static_cast<size_t>(groups[0].rows) * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, second, bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (GROUPS == 2) {
            _tile_loadd(7, groups[1].pairs + k / 2 * groups[1].rows, static_cast<size_t>(groups[1].rows) * 4);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }

    /* An address past the end does no harm. */
    static void fetch(const WeightTiles<bf16> &weights, int64_t k) {
        for (int i = 0; i < 2; i++)
            for (int64_t n = FETCH_ROWS; n < FETCH_ROWS + TILE; n++)
                _mm_prefetch(reinterpret_cast<const char *>(weights.at[i] + n * weights.depth + k), _MM_HINT_T0);
    }

    /* Copy what a tile cannot load where it lies: other types, fewer rows, the end of a row. */
    template <class W>
    static void stage(const W *from, int64_t count, int64_t depth, int64_t k, bf16 *to) {
        using L = Lanes<bf16>;
        for (int64_t n = 0; n < TILE; n++) {
            for (int64_t i = 0; i < STAGED_TILES; i++) {
                const int64_t at = k + i * TILE_DEPTH, left = depth - at;
                __m512i values{};
                if (n < count && left >= TILE_DEPTH)
                    values = L::read(from + n * depth + at);
                else if (n < count && left > 0)
                    values = L::read_part(from + n * depth + at, left);
                L::write(to + (n * STAGED_TILES + i) * TILE_DEPTH, values);
            }
        }
    }

    int64_t rows_[2] = {0, 0};
};

}  // namespace

#endif
