/* Depthwise causal convolution with SiLU, a block of channels at a time.
 *
 * The state of a slot holds each channel's last W - 1 inputs side by side, oldest first.
 */
#include "exports.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t MAX_WIDTH = 16;       // W
constexpr int64_t CHANNELS = 256;       // that one pass over a sequence takes
constexpr int64_t SHARE_STEP = 64;      // channels that go to one thread together
constexpr int64_t AHEAD = 8;            // tokens
constexpr int64_t SERIAL_VALUES = 16384;

/* Where TAPS is not 0 it is W, and known to the compiler: counting through so few taps takes longer than using them. */
template <class T, int TAPS>
struct Inputs {
    const T *x;  // [token, channel]
    int64_t x_stride, num_channels, any_width;
    const T *weight;  // [channel, W]
    T *out;           // [token, channel], contiguous
    T *states;        // [slot, channel, W - 1]

    int64_t width() const { return TAPS ? TAPS : any_width; }
};

/* The taps of some channels, W rows of CHANNELS, and the inputs before a sequence's first token. */
template <class T>
struct Block {
    float taps[MAX_WIDTH * CHANNELS];
    T before[MAX_WIDTH * CHANNELS];  // W - 1 rows
};

template <class T, int TAPS>
inline void read_taps(const Inputs<T, TAPS> &in, int64_t first, int64_t count, Block<T> &block) {
    for (int64_t c = 0; c < count; c++) {
        for (int64_t w = 0; w < in.width(); w++)
            block.taps[w * CHANNELS + c] = as_float(in.weight[(first + c) * in.width() + w]);
    }
}

template <class T, int TAPS>
inline void read_state(const Inputs<T, TAPS> &in, const T *__restrict state, bool has_context, int64_t count,
                       Block<T> &block) {
    const int64_t history = in.width() - 1;
    T *__restrict before = block.before;
    if (!has_context) {
        memset(before, 0, static_cast<size_t>(history * CHANNELS) * sizeof(T));
        return;
    }
    for (int64_t c = 0; c < count; c++)
        for (int64_t w = 0; w < history; w++) before[w * CHANNELS + c] = state[c * history + w];
}

/* The inputs at `token`, which may be one of those before the first. */
template <class T, int TAPS>
inline const T *inputs_at(const Inputs<T, TAPS> &in, const Block<T> &block, int64_t begin, int64_t token,
                          int64_t first) {
    if (token < begin) return block.before + (token - begin + in.width() - 1) * CHANNELS;
    return in.x + token * in.x_stride + first;
}

template <class T, int TAPS>
inline void write_state(const Inputs<T, TAPS> &in, const Block<T> &block, int64_t begin, int64_t end, int64_t first,
                        int64_t count, T *__restrict state) {
    const int64_t history = in.width() - 1;
    const T *rows[MAX_WIDTH];
    for (int64_t w = 0; w < history; w++) rows[w] = inputs_at(in, block, begin, end - history + w, first);
    for (int64_t c = 0; c < count; c++)
        for (int64_t w = 0; w < history; w++) state[c * history + w] = rows[w][c];
}

/* Rows of a block lie pages apart, where the core's own prefetchers do not follow. */
template <class T, int TAPS>
inline void prefetch(const Inputs<T, TAPS> &in, int64_t token, int64_t first, int64_t count) {
    for (int64_t c = first; c < first + count; c += LINE / static_cast<int64_t>(sizeof(T))) {
        __builtin_prefetch(in.x + token * in.x_stride + c);
        __builtin_prefetch(in.out + token * in.num_channels + c, 1);
    }
}

/* Tokens [begin, end) of one sequence, channels [first, first + count). */
template <class T, int TAPS>
inline void convolve(const Inputs<T, TAPS> &in, const Block<T> &block, int64_t begin, int64_t end, int64_t first,
                     int64_t count) {
    for (int64_t token = begin; token < end; token++) {
        if (token + AHEAD < end) prefetch(in, token + AHEAD, first, count);
        const T *rows[MAX_WIDTH];
        for (int64_t w = 0; w < in.width(); w++)
            rows[w] = inputs_at(in, block, begin, token - in.width() + 1 + w, first);
        T *out = in.out + token * in.num_channels + first;
        for_vectors(count, [&](int64_t c, int64_t lanes) {
            vec total = load_first(rows[0] + c, lanes) * load(block.taps + c);
            for (int64_t w = 1; w < in.width(); w++)
                total = fma(load_first(rows[w] + c, lanes), load(block.taps + w * CHANNELS + c), total);
            store_first(out + c, silu(total), lanes);
        });
    }
}

template <class T, int TAPS>
void run(const Inputs<T, TAPS> &in, const int64_t *slots, const int32_t *starts, const int32_t *contexts,
         int64_t num_seqs, const int64_t *checkpoints, int64_t num_checkpoints, int64_t threads) {
    const int64_t history = in.width() - 1, slot_size = in.num_channels * history;
    parallel(starts[num_seqs] * in.num_channels < SERIAL_VALUES ? 1 : threads, [&](Team team) {
        Block<T> block = {};
        const Range share = team.share(in.num_channels, SHARE_STEP);
        for (int64_t first = share.begin; first < share.end; first += CHANNELS) {
            const int64_t count = at_most(CHANNELS, share.end - first);
            read_taps(in, first, count, block);
            for (int64_t i = 0; i < num_seqs; i++) {
                const int64_t begin = starts[i], end = starts[i + 1];
                if (begin == end) continue;
                T *state = in.states + slots[i] * slot_size + first * history;
                read_state(in, state, contexts[i] > 0, count, block);
                convolve(in, block, begin, end, first, count);
                write_state(in, block, begin, end, first, count, state);
                for (int64_t c = 0; c < num_checkpoints; c++) {
                    const int64_t *checkpoint = checkpoints + 3 * c;
                    if (checkpoint[0] == i)
                        write_state(in, block, begin, begin + checkpoint[1], first, count,
                                    in.states + checkpoint[2] * slot_size + first * history);
                }
            }
        }
    });
}

template <class T, class... Rest>
void run_any(const Inputs<T, 0> &in, Rest... rest) {
    if (in.any_width == 4) {
        const Inputs<T, 4> known{in.x, in.x_stride, in.num_channels, 4, in.weight, in.out, in.states};
        run(known, rest...);
    } else {
        run(in, rest...);
    }
}

}  // namespace

MOE_EXPORT(void, moe_causal_conv1d)
(const void *x, int64_t x_stride, const void *weight, void *states, const int64_t *slots, const int32_t *starts,
 const int32_t *contexts, void *out, int64_t num_seqs, const int64_t *checkpoints, int64_t num_checkpoints,
 int64_t num_channels, int64_t width, int64_t is_bf16, int64_t threads) {
    if (is_bf16) {
        const Inputs<bf16, 0> in{static_cast<const bf16 *>(x), x_stride, num_channels, width,
                                 static_cast<const bf16 *>(weight), static_cast<bf16 *>(out),
                                 static_cast<bf16 *>(states)};
        run_any(in, slots, starts, contexts, num_seqs, checkpoints, num_checkpoints, threads);
    } else {
        const Inputs<float, 0> in{static_cast<const float *>(x), x_stride, num_channels, width,
                                  static_cast<const float *>(weight), static_cast<float *>(out),
                                  static_cast<float *>(states)};
        run_any(in, slots, starts, contexts, num_seqs, checkpoints, num_checkpoints, threads);
    }
}
