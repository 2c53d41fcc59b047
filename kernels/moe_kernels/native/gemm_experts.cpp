/* The experts' two products for all tokens at once: y = sum over a token's choices of weight * down(silu(gate) * up).
 *
 * Gate and up are dealt out as (expert, block of F), down as runs of H: each thread then sums its columns over the
 * experts in ascending order, so that nothing races and a sum's order never changes.
 */
#include "amx_experts.h"
#include "experts.h"
#include "exports.h"
#include "gemm_block.h"
#include "threads.h"

namespace {

constexpr int64_t TOKENS_AT_ONCE = 2048;  // bounds the scratch: all experts are gone through for as many tokens
constexpr int64_t GATE_BLOCK = BLOCK / 2;

/* h = silu(gate) * up for a chunk of pairs: `sums` holds GATE_BLOCK columns of gate, then as many of up. */
template <class X>
inline void write_hidden(const float *sums, int64_t num_pairs, int64_t count, const float *gate_scale,
                         const float *up_scale, X *h, int64_t h_stride) {
    for (int64_t p = 0; p < num_pairs; p++) {
        for (int64_t f = 0; f < count; f += WIDTH) {
            const int64_t lanes = at_most(WIDTH, count - f);
            vec gate = load(sums + p * BLOCK + f), up = load(sums + p * BLOCK + GATE_BLOCK + f);
            if (gate_scale) {
                gate = gate * load_part(gate_scale + f, lanes);
                up = up * load_part(up_scale + f, lanes);
            }
            store_part(h + p * h_stride + f, silu(gate) * up, lanes);
        }
    }
}

template <class W, class X, class Y>
class Call {
   public:
    Call(const Experts<W> &experts, const Sizes &size) : experts_(experts), size_(size) {}

    bool reserve(int64_t num_threads) {
        const int64_t tokens = at_most(size_.G, TOKENS_AT_ONCE), pairs = tokens * size_.K;
        x_stride_ = padded<X>(size_.H);
        h_stride_ = padded<X>(size_.F);
        const int64_t deepest = size_.H > size_.F ? size_.H : size_.F;
        panel_size_ = Block<W, X>::panel_size(deepest);
        columns_ = columns_at_once(size_.H, tokens, num_threads, BLOCK);
        sums_size_ = tokens * columns_;
        const int64_t bytes = Scratch::size_of<X>(tokens * x_stride_) + Scratch::size_of<X>(pairs * h_stride_) +
                              Scratch::size_of<X>(num_threads * panel_size_) +
                              Scratch::size_of<float>(num_threads * sums_size_) +
                              Pairs::size_of(size_, pairs);
        if (!scratch.reserve(bytes)) return false;
        x_ = scratch.take<X>(tokens * x_stride_);
        h_ = scratch.take<X>(pairs * h_stride_);
        panels_ = scratch.take<X>(num_threads * panel_size_);
        sums_ = scratch.take<float>(num_threads * sums_size_);
        pairs_.take(scratch, size_, pairs);
        return true;
    }

    void run(const Y *x, int64_t x_row, const int64_t *ids, const Y *weights, Y *y, int64_t num_threads) {
        int64_t next_item[2] = {};
        parallel(num_threads, [&](Team team) {
            for (int64_t first = 0; first < size_.G; first += TOKENS_AT_ONCE) {
                const int64_t tokens = at_most(size_.G - first, TOKENS_AT_ONCE);
                if (team.index == 0) {
                    pairs_.sort(ids + first * size_.K, weights + first * size_.K, tokens, size_);
                    next_item[0] = next_item[1] = 0;
                }
                const Range own = team.share(tokens);
                for (int64_t t = own.begin; t < own.end; t++)
                    copy_row(x + (first + t) * x_row, size_.H, x_ + t * x_stride_);
                team.barrier();
                gate_up(team, next_item[0]);
                team.barrier();
                down(team, next_item[1], y + first * size_.H, tokens);
                if (first + TOKENS_AT_ONCE < size_.G) team.barrier();  // all is read before it is overwritten
            }
        });
    }

   private:
    /* The block of an item's gate rows, as (expert, first row). */
    struct Place {
        int64_t expert, f, count;
    };
    Place place(int64_t item) const {
        const int64_t blocks = blocks_of(size_.F, GATE_BLOCK), f = item % blocks * GATE_BLOCK;
        return {pairs_.active[item / blocks], f, at_most(GATE_BLOCK, size_.F - f)};
    }
    const W *gate_rows(Place at) const { return experts_.gate_up + (at.expert * 2 * size_.F + at.f) * size_.H; }

    /* Threads claim several items at once: their rows are runs through memory that go on from one item to the next. */
    void gate_up(Team team, int64_t &next_claim) {
        constexpr int64_t MOST_AT_ONCE = 4, CLAIMS_A_THREAD = 8;
        const int64_t num_items = pairs_.num_active * blocks_of(size_.F, GATE_BLOCK);
        const int64_t at_once = at_most(MOST_AT_ONCE, blocks_of(num_items, CLAIMS_A_THREAD * team.size));
        X *panel = panels_ + team.index * panel_size_;
        for (int64_t begin = claim(next_claim) * at_once; begin < num_items; begin = claim(next_claim) * at_once) {
            const int64_t end = at_most(begin + at_once, num_items);
            for (int64_t item = begin; item < end; item++)
                gate_up_item(place(item), gate_rows(place(item + 1 < num_items ? item + 1 : item)), panel);
        }
    }

    void gate_up_item(Place at, const W *next, X *panel) {
        const int64_t begin = pairs_.first[at.expert], end = pairs_.first[at.expert + 1];
        const int64_t up_offset = size_.F * size_.H, row = at.expert * 2 * size_.F + at.f;
        const W *gate_w = gate_rows(at);
        Block<W, X> gate(gate_w, at.count, size_.H, end - begin, panel, gate_w + up_offset);
        Block<W, X> up(gate_w + up_offset, at.count, size_.H, end - begin, panel + panel_size_ / 2, next);
        const float *scale = experts_.gate_up_scale;
        float sums[ROWS_CHUNK * BLOCK];
        for (int64_t pair = begin; pair < end; pair += ROWS_CHUNK) {
            const int64_t count = at_most(ROWS_CHUNK, end - pair);
            const X *rows[ROWS_CHUNK];
            for (int64_t p = 0; p < count; p++) rows[p] = x_ + pairs_.token[pair + p] * x_stride_;
            gate.multiply(rows, count, sums, BLOCK);
            up.multiply(rows, count, sums + GATE_BLOCK, BLOCK);
            write_hidden(sums, count, at.count, scale ? scale + row : nullptr, scale ? scale + row + size_.F : nullptr,
                         h_ + pair * h_stride_ + at.f, h_stride_);
        }
        if (at.f + at.count == size_.F)  // what tiles read past the end is zero
            for (int64_t pair = begin; pair < end; pair++)
                for (int64_t f = size_.F; f < h_stride_; f++) h_[pair * h_stride_ + f] = X{};
    }

    void down(Team team, int64_t &next_item, Y *y, int64_t num_tokens) {
        float *sums = sums_ + team.index * sums_size_;
        X *panel = panels_ + team.index * panel_size_;
        for (int64_t item = claim(next_item); item < blocks_of(size_.H, columns_); item = claim(next_item)) {
            const int64_t begin = item * columns_, end = at_most(begin + columns_, size_.H);
            memset(sums, 0, static_cast<size_t>(num_tokens * columns_) * sizeof(float));
            for (int64_t i = 0; i < pairs_.num_active; i++) {
                for (int64_t column = begin; column < end; column += BLOCK) {
                    const bool last = column + BLOCK >= end;
                    const int64_t after = pairs_.active[last && i + 1 < pairs_.num_active ? i + 1 : i];
                    const W *next = experts_.down + (after * size_.H + (last ? begin : column + BLOCK)) * size_.F;
                    down_block(pairs_.active[i], column, at_most(BLOCK, end - column), next, sums + column - begin,
                               panel);
                }
            }
            for (int64_t t = 0; t < num_tokens; t++)
                for (int64_t n = begin; n < end; n += WIDTH)
                    store_part(y + t * size_.H + n, load(sums + t * columns_ + n - begin), at_most(WIDTH, end - n));
        }
    }

    /* Add an expert's weighted results for a block of columns to its tokens' sums. */
    void down_block(int64_t expert, int64_t column, int64_t count, const W *next, float *sums, X *panel) {
        const int64_t begin = pairs_.first[expert], end = pairs_.first[expert + 1];
        const W *w = experts_.down + (expert * size_.H + column) * size_.F;
        Block<W, X> block(w, count, size_.F, end - begin, panel, next);
        const float *scale = experts_.down_scale ? experts_.down_scale + expert * size_.H + column : nullptr;
        float own[ROWS_CHUNK * BLOCK];
        for (int64_t first = begin; first < end; first += ROWS_CHUNK) {
            const int64_t num_rows = at_most(ROWS_CHUNK, end - first);
            const X *rows[ROWS_CHUNK];
            for (int64_t p = 0; p < num_rows; p++) rows[p] = h_ + (first + p) * h_stride_;
            block.multiply(rows, num_rows, own, BLOCK);
            for (int64_t p = 0; p < num_rows; p++) {
                float *sum = sums + pairs_.token[first + p] * columns_;
                const vec weight = broadcast(pairs_.weight[first + p]);
                for (int64_t n = 0; n < count; n += WIDTH) {
                    vec value = load(own + p * BLOCK + n);
                    if (scale) value = value * load_part(scale + n, at_most(WIDTH, count - n));
                    store(sum + n, fma(weight, value, load(sum + n)));
                }
            }
        }
    }

    Experts<W> experts_;
    Sizes size_;
    Pairs pairs_{};
    X *x_, *h_, *panels_;
    float *sums_;
    int64_t x_stride_, h_stride_, panel_size_, columns_, sums_size_;
};

/* What computes values in bfloat16 that are multiplied as X. */
template <class W, class X>
struct CallInBfloat16 {
    using Type = Call<W, X, bf16>;
};
#ifdef __AMX_BF16__
template <class W>
struct CallInBfloat16<W, bf16> {
    using Type = AmxCall<W>;
};
#endif

template <class Call, class W, class Y>
inline int64_t fused_experts(const Y *x, int64_t x_row, const int64_t *ids, const Y *weights,
                             const Experts<W> &experts, Y *y, const Sizes &size, int64_t num_threads) {
    Call call(experts, size);
    if (!call.reserve(num_threads)) return 1;
    call.run(x, x_row, ids, weights, y, num_threads);
    return 0;
}

}  // namespace

/* y[G, H], in x's type as the routing weights are. `ids` are from -1 (elsewhere) to L - 1; scales may be null. All but x,
 * whose rows are `x_stride` apart, is contiguous. Returns 0; 1 if there is no memory; 2 for an id out of its range. */
MOE_EXPORT(int64_t, moe_fused_experts)
(const void *x, int64_t x_stride, int64_t x_type, const int64_t *ids, const void *weights, const void *gate_up,
 const void *down, int64_t w_type, const float *gate_up_scale, const float *down_scale, void *y, int64_t G, int64_t K,
 int64_t L, int64_t H, int64_t F, int64_t num_threads) {
    for (int64_t i = 0; i < G * K; i++)
        if (ids[i] < -1 || ids[i] >= L) return 2;
    int64_t status = 0;
    const Sizes size{G, K, L, H, F};
    with_types(w_type, x_type, [&](auto w_tag, auto x_tag) {
        using W = decltype(w_tag);
        using X = decltype(x_tag);
        const Experts<W> experts{static_cast<const W *>(gate_up), static_cast<const W *>(down), gate_up_scale,
                                 down_scale};
        if constexpr (sizeof(X) == sizeof(float)) {
            if (x_type == FLOAT32) {
                status = fused_experts<Call<W, X, float>>(static_cast<const float *>(x), x_stride, ids,
                                                          static_cast<const float *>(weights), experts,
                                                          static_cast<float *>(y), size, num_threads);
                return;
            }
        }
        status = fused_experts<typename CallInBfloat16<W, X>::Type>(static_cast<const bf16 *>(x), x_stride, ids,
                                                                    static_cast<const bf16 *>(weights), experts,
                                                                    static_cast<bf16 *>(y), size, num_threads);
    });
    return status;
}
