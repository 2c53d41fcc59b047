/* The experts' two products on AMX tiles, for activations in bfloat16; see gemm_experts.cpp.
 *
 * Every expert's rows are packed before its weights are read, and the first product writes its result packed for the
 * second. Work is dealt out as there: (expert, 16 of F), then runs of H.
 */
#pragma once

#ifdef __AMX_BF16__

#include "amx.h"
#include "experts.h"
#include "threads.h"

namespace {

constexpr int64_t AMX_TOKENS_AT_ONCE = 1024;  // bounds the scratch: K rows of H for each

/* Two rows of features for the rows of a group, as pairs. */
inline void write_pairs(vec even, vec odd, uint32_t *to, int64_t num_rows) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow(even)), high = _mm512_cvtepu16_epi32(narrow(odd));
    _mm512_mask_storeu_epi32(to, first_lanes(num_rows), _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

template <class W>
class AmxCall {
   public:
    AmxCall(const Experts<W> &experts, const Sizes &size)
        : experts_(experts), size_(size), x_half_(tiled(size.H) / 2), h_half_(tiled(size.F) / 2) {}

    bool reserve(int64_t num_threads) {
        const int64_t tokens = at_most(size_.G, AMX_TOKENS_AT_ONCE), pairs = tokens * size_.K;
        columns_ = columns_at_once(size_.H, tokens, num_threads, 2 * TILE);
        sums_size_ = tokens * columns_;
        if (!scratch.reserve(Scratch::size_of<uint32_t>(pairs * x_half_) + Scratch::size_of<uint32_t>(pairs * h_half_) +
                             Scratch::size_of<float>(num_threads * sums_size_) + Pairs::size_of(size_, pairs)))
            return false;
        x_ = scratch.take<uint32_t>(pairs * x_half_);
        h_ = scratch.take<uint32_t>(pairs * h_half_);
        sums_ = scratch.take<float>(num_threads * sums_size_);
        pairs_.take(scratch, size_, pairs);
        return true;
    }

    void run(const bf16 *x, int64_t x_row, const int64_t *ids, const bf16 *weights, bf16 *y, int64_t num_threads) {
        int64_t next[3] = {};
        parallel(num_threads, [&](Team team) {
            Tiles tiles;
            for (int64_t first = 0; first < size_.G; first += AMX_TOKENS_AT_ONCE) {
                const int64_t tokens = at_most(size_.G - first, AMX_TOKENS_AT_ONCE);
                if (team.index == 0) {
                    pairs_.sort(ids + first * size_.K, weights + first * size_.K, tokens, size_);
                    next[0] = next[1] = next[2] = 0;
                }
                team.barrier();
                pack_rows(x + first * x_row, x_row, next[0]);
                team.barrier();
                gate_up(tiles, next[1]);
                team.barrier();
                down(tiles, next[2], sums_ + team.index * sums_size_, y + first * size_.H, tokens);
                team.barrier();  // all is read before the next tokens overwrite it
            }
        });
    }

   private:
    /* As `for_groups` of amx.h for an expert's rows, with their first pair. */
    template <class Body>
    void for_pairs(int64_t expert, const uint32_t *packed, int64_t half, const Body &body) const {
        const int64_t begin = pairs_.first[expert], count = pairs_.first[expert + 1] - begin;
        for_groups(packed + begin * half, count, half, [&](const Group *groups, int64_t num_groups, int64_t row) {
            body(groups, num_groups, begin + row);
        });
    }

    void pack_rows(const bf16 *x, int64_t x_row, int64_t &next) {
        for (int64_t i = claim(next); i < pairs_.num_active; i = claim(next)) {
            const int64_t end = pairs_.first[pairs_.active[i] + 1];
            for (int64_t pair = pairs_.first[pairs_.active[i]]; pair < end; pair += TILE) {
                const int64_t count = at_most(TILE, end - pair);
                const bf16 *rows[TILE];
                for (int64_t p = 0; p < count; p++) rows[p] = x + pairs_.token[pair + p] * x_row;
                pack(rows, count, size_.H, x_ + pair * x_half_);
            }
        }
    }

    void gate_up(Tiles &tiles, int64_t &next) {
        const int64_t blocks = blocks_of(size_.F, TILE), num_items = pairs_.num_active * blocks;
        for (int64_t item = claim(next); item < num_items; item = claim(next))
            gate_up_item(tiles, pairs_.active[item / blocks], item % blocks * TILE);
    }

    void gate_up_item(Tiles &tiles, int64_t expert, int64_t f) {
        const int64_t count = at_most(TILE, size_.F - f), row = expert * 2 * size_.F + f;
        const W *gate = experts_.gate_up + row * size_.H;
        const WeightTiles<W> weights{{gate, gate + size_.F * size_.H}, {count, count}, size_.H};
        const float *scale = experts_.gate_up_scale ? experts_.gate_up_scale + row : nullptr;
        for_pairs(expert, x_, x_half_, [&](const Group *groups, int64_t num_groups, int64_t pair) {
            tiles.multiply(weights, groups, num_groups);
            for (int64_t g = 0; g < num_groups; g++, pair += TILE) {
                uint32_t *h = h_ + pair * h_half_;
                if (groups[g].rows == 1)
                    write_hidden_row(tiles.sums, g, f, count, scale, h);
                else
                    write_hidden(tiles.sums, g, groups[g].rows, f, count, scale, h);
                // The last block writes zeros up to where the second product's tiles end.
                if (f + TILE >= size_.F)
                    for (int64_t k = (f + TILE) / 2 * groups[g].rows; k < h_half_ * groups[g].rows; k++) h[k] = 0;
            }
        });
    }

    /* h = silu(gate) * up for 16 features of a group of one row, whose pairs lie as its elements do. */
    void write_hidden_row(const Sums &sums, int64_t group, int64_t f, int64_t count, const float *scale,
                          uint32_t *h) const {
        vec gate = load(sums.of[0][group]), up = load(sums.of[1][group]);
        if (scale) {
            gate = gate * load_part(scale, count);
            up = up * load_part(scale + size_.F, count);
        }
        store(reinterpret_cast<bf16 *>(h) + f, silu(gate) * up);
    }

    /* h = silu(gate) * up for 16 features of a group, from feature f on. */
    void write_hidden(const Sums &sums, int64_t group, int64_t num_rows, int64_t f, int64_t count, const float *scale,
                      uint32_t *h) const {
        vec hidden[TILE];
        for (int64_t n = 0; n < TILE; n++) {  // those from `count` on are zero, as their weights are
            vec gate = load_part(sums.of[0][group] + n * num_rows, num_rows);
            vec up = load_part(sums.of[1][group] + n * num_rows, num_rows);
            if (scale && n < count) {
                gate = gate * broadcast(scale[n]);
                up = up * broadcast(scale[size_.F + n]);
            }
            hidden[n] = silu(gate) * up;
        }
        for (int64_t n = 0; n < TILE; n += 2) write_pairs(hidden[n], hidden[n + 1], h + (f + n) / 2 * num_rows, num_rows);
    }

    void down(Tiles &tiles, int64_t &next, float *sums, bf16 *y, int64_t num_tokens) {
        for (int64_t item = claim(next); item < blocks_of(size_.H, columns_); item = claim(next)) {
            const int64_t begin = item * columns_, end = at_most(begin + columns_, size_.H);
            memset(sums, 0, static_cast<size_t>(num_tokens * columns_) * sizeof(float));
            for (int64_t i = 0; i < pairs_.num_active; i++)
                for (int64_t column = begin; column < end; column += 2 * TILE)
                    down_block(tiles, pairs_.active[i], column, at_most(2 * TILE, end - column), sums + column - begin);
            for (int64_t t = 0; t < num_tokens; t++)
                for (int64_t n = begin; n < end; n += WIDTH)
                    store_part(y + t * size_.H + n, load(sums + t * columns_ + n - begin), at_most(WIDTH, end - n));
        }
    }

    /* Add an expert's weighted results for a block of columns to its tokens' sums. */
    void down_block(Tiles &tiles, int64_t expert, int64_t column, int64_t count, float *sums) {
        const int64_t row = expert * size_.H + column;
        const auto weights = WeightTiles<W>::of_run(experts_.down + row * size_.F, count, size_.F);
        const float *scale = experts_.down_scale ? experts_.down_scale + row : nullptr;
        for_pairs(expert, h_, h_half_, [&](const Group *groups, int64_t num_groups, int64_t pair) {
            tiles.multiply(weights, groups, num_groups);
            tiles.for_rows(weights, groups, num_groups, scale, [&](int64_t r, int64_t half, vec value) {
                float *sum = sums + pairs_.token[pair + r] * columns_ + half * TILE;
                store(sum, fma(broadcast(pairs_.weight[pair + r]), value, load(sum)));
            });
        });
    }

    Experts<W> experts_;
    Sizes size_;
    Pairs pairs_{};
    int64_t x_half_, h_half_;  // pairs of elements in a packed row
    uint32_t *x_, *h_;
    float *sums_;
    int64_t columns_, sums_size_;
};

}  // namespace

#endif
