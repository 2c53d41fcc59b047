/* y = x @ w^T for one weight.
 *
 * Shape legend: T rows of activations, N output features, K input features.
 */
#include "amx.h"
#include "exports.h"
#include "gemm_block.h"
#include "threads.h"

namespace {

/* Rows whose activations are made ready at once: what bounds the scratch. */
constexpr int64_t ROWS_AT_ONCE = 1024;
/* Up to how many rows each thread makes all of them ready for itself: less work than waiting for the others. */
constexpr int64_t OWN_ROWS = 8;
/* With fewer multiplications a thread is done before a second one has woken. */
constexpr int64_t SERIAL_WORK = 1 << 18;

struct Sizes {
    int64_t T, N, K;
};

/* How the blocks of weights, and if there are few of them the rows, are dealt out to a team. */
struct Deal {
    int64_t blocks, row_parts;

    Deal(int64_t num_weights, int64_t num_rows, int64_t team) {
        blocks = (num_weights + BLOCK - 1) / BLOCK;
        const int64_t wanted = team > 1 ? (4 * team + blocks - 1) / blocks : 1;
        row_parts = at_most(wanted, (num_rows + ROWS_CHUNK - 1) / ROWS_CHUNK);
    }
};

/* The sums of a chunk of rows with a block of weights, scaled, into y. */
template <class Y>
inline void write_block(const float *sums, int64_t num_rows, int64_t num_weights, const float *scale, Y *y,
                        int64_t y_stride) {
    for (int64_t t = 0; t < num_rows; t++) {
        for (int64_t n = 0; n < num_weights; n += WIDTH) {
            const int64_t count = at_most(WIDTH, num_weights - n);
            vec value = load(sums + t * BLOCK + n);
            if (scale) value = value * load_part(scale + n, count);
            store_part(y + t * y_stride + n, value, count);
        }
    }
}

/* One item: all rows of a range with one block of weights. */
template <class W, class X, class Y>
inline void multiply_item(const W *w, int64_t num_weights, const float *scale, const X *x, Range rows, Y *y,
                          Sizes size, X *panel) {
    Block<W, X> block(w, num_weights, size.K, rows.end - rows.begin, panel, w + num_weights * size.K);
    float sums[ROWS_CHUNK * BLOCK];
    for (int64_t first = rows.begin; first < rows.end; first += ROWS_CHUNK) {
        const int64_t count = at_most(ROWS_CHUNK, rows.end - first);
        const X *pointers[ROWS_CHUNK];
        for (int64_t t = 0; t < count; t++) pointers[t] = x + (first + t) * padded<X>(size.K);
        block.multiply(pointers, count, sums, BLOCK);
        write_block(sums, count, num_weights, scale, y + first * size.N, size.N);
    }
}

template <class W, class X, class Y>
inline int64_t linear(const Y *x, int64_t x_stride, const W *w, const float *scale, Y *y, Sizes size,
                      int64_t num_threads) {
    const int64_t at_once = at_most(size.T, ROWS_AT_ONCE);
    const int64_t panel_size = Block<W, X>::panel_size(size.K);
    const int64_t rows_size = at_once * padded<X>(size.K);
    const bool shared = size.T > OWN_ROWS;
    const int64_t copies = shared ? 1 : num_threads;
    if (!scratch.reserve(copies * Scratch::size_of<X>(rows_size) + num_threads * Scratch::size_of<X>(panel_size)))
        return 1;
    X *all_ready = scratch.take<X>(copies * rows_size);
    X *panels = scratch.take<X>(num_threads * panel_size);
    parallel(num_threads, [&](Team team) {
        X *panel = panels + team.index * panel_size;
        X *ready = all_ready + (shared ? 0 : team.index * rows_size);
        for (int64_t first = 0; first < size.T; first += at_once) {
            const int64_t count = at_most(at_once, size.T - first);
            const Range own = shared ? team.share(count) : Range{0, count};
            for (int64_t t = own.begin; t < own.end; t++)
                copy_row(x + (first + t) * x_stride, size.K, ready + t * padded<X>(size.K));
            if (shared) team.barrier();
            const Deal deal(size.N, count, team.size);
            const Range items = team.share(deal.blocks * deal.row_parts);
            for (int64_t item = items.begin; item < items.end; item++) {
                const int64_t n = item / deal.row_parts * BLOCK;
                const Range rows = Team{item % deal.row_parts, deal.row_parts}.share(count, ROWS_CHUNK);
                multiply_item(w + n * size.K, at_most(BLOCK, size.N - n), scale ? scale + n : nullptr, ready, rows,
                              y + first * size.N + n, size, panel);
            }
            if (first + at_once < size.T) team.barrier();  // the rows are read before they are overwritten
        }
    });
    return 0;
}

#ifdef __AMX_BF16__

/* Rows that are packed at once: what a core's cache holds while all weights go by. */
constexpr int64_t AMX_ROWS_AT_ONCE = 256;

/* All rows with two tiles of weights, from feature `n` on, into y. */
template <class W>
inline void multiply_tiles(Tiles &tiles, const W *w, const float *scale, const uint32_t *packed, int64_t num_rows,
                           int64_t n, bf16 *y, Sizes size) {
    const auto weights = WeightTiles<W>::of_run(w + n * size.K, at_most(2 * TILE, size.N - n), size.K);
    for_groups(packed, num_rows, tiled(size.K) / 2, [&](const Group *groups, int64_t num_groups, int64_t row) {
        tiles.multiply(weights, groups, num_groups);
        const auto write = [&](int64_t r, int64_t half, vec value) {
            store_part(y + (row + r) * size.N + n + half * TILE, value, weights.count[half]);
        };
        tiles.for_rows(weights, groups, num_groups, scale ? scale + n : nullptr, write);
    });
}

template <class W>
inline int64_t amx_linear(const bf16 *x, int64_t x_stride, const W *w, const float *scale, bf16 *y, Sizes size,
                          int64_t num_threads) {
    const int64_t half = tiled(size.K) / 2, at_once = at_most(size.T, AMX_ROWS_AT_ONCE);
    if (!scratch.reserve(Scratch::size_of<uint32_t>(at_once * half))) return 1;
    uint32_t *packed = scratch.take<uint32_t>(at_once * half);
    parallel(num_threads, [&](Team team) {
        Tiles tiles;
        for (int64_t first = 0; first < size.T; first += at_once) {
            const int64_t count = at_most(at_once, size.T - first);
            const Range own = team.share(count, TILE);
            for (int64_t t = own.begin; t < own.end; t += TILE) {
                const bf16 *rows[TILE];
                const int64_t in_group = at_most(TILE, count - t);
                for (int64_t r = 0; r < in_group; r++) rows[r] = x + (first + t + r) * x_stride;
                pack(rows, in_group, size.K, packed + t * half);
            }
            team.barrier();
            const Range features = team.share(size.N, 2 * TILE);
            for (int64_t n = features.begin; n < features.end; n += 2 * TILE)
                multiply_tiles(tiles, w, scale, packed, count, n, y + first * size.N, size);
            if (first + at_once < size.T) team.barrier();  // the rows are read before they are overwritten
        }
    });
    return 0;
}

#endif

}  // namespace

/* y[T, N] = x[T, K] @ w[N, K]^T in x's type; `scale` (a factor for each row of w) may be null. All but x, whose rows
 * are `x_stride` apart, is contiguous. Returns 0, or 1 if there is no memory. */
MOE_EXPORT(int64_t, moe_linear)
(const void *x, int64_t x_stride, int64_t x_type, const void *w, int64_t w_type, const float *scale, void *y, int64_t T,
 int64_t N, int64_t K, int64_t num_threads) {
    int64_t status = 0;
    if (T * N * K < SERIAL_WORK) num_threads = 1;
    with_types(w_type, x_type, [&](auto w_tag, auto x_tag) {
        using W = decltype(w_tag);
        using X = decltype(x_tag);
        const W *weights = static_cast<const W *>(w);
        const Sizes size{T, N, K};
        if constexpr (sizeof(X) == sizeof(float)) {
            if (x_type == FLOAT32) {
                status = linear<W, X>(static_cast<const float *>(x), x_stride, weights, scale, static_cast<float *>(y),
                                      size, num_threads);
                return;
            }
        }
        const bf16 *rows = static_cast<const bf16 *>(x);
#ifdef __AMX_BF16__
        if constexpr (sizeof(X) == sizeof(bf16)) {
            status = amx_linear(rows, x_stride, weights, scale, static_cast<bf16 *>(y), size, num_threads);
            return;
        }
#endif
        status = linear<W, X>(rows, x_stride, weights, scale, static_cast<bf16 *>(y), size, num_threads);
    });
    return status;
}
