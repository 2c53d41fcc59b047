/* Depthwise causal convolution with SiLU, a block of channels at a time.
 *
 * The state of a slot holds each channel's last W - 1 inputs side by side, oldest first.
 */
#include "exports.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t MAX_WIDTH = 16;       // W
constexpr int64_t CHANNELS = 128;       // that one pass over a sequence takes
/* Tokens are too far apart for the core to fetch the next ones by itself. */
constexpr int64_t TOKENS_AHEAD = 4;
constexpr int64_t SERIAL_VALUES = 16384;

template <class T>
struct Inputs {
    const T *x;  // [token, channel]
    int64_t x_stride, num_channels, width;
    const T *weight;  // [channel, W]
    T *out;           // [token, channel], contiguous
    T *states;        // [slot, channel, W - 1]
};

/* The taps of some channels, W rows of CHANNELS, and the inputs before a sequence's first token. */
template <class T>
struct Block {
    float taps[MAX_WIDTH * CHANNELS];
    T before[MAX_WIDTH * CHANNELS];  // W - 1 rows
};

template <class T>
inline void read_taps(const Inputs<T> &in, int64_t first, int64_t count, Block<T> &block) {
    for (int64_t c = 0; c < count; c++) {
        for (int64_t w = 0; w < in.width; w++)
            block.taps[w * CHANNELS + c] = as_float(in.weight[(first + c) * in.width + w]);
    }
}

template <class T>
inline void read_state(const Inputs<T> &in, const T *state, bool has_context, int64_t count, Block<T> &block) {
    const int64_t history = in.width - 1;
    for (int64_t w = 0; w < history; w++)
        for (int64_t c = 0; c < count; c++) block.before[w * CHANNELS + c] = has_context ? state[c * history + w] : T{};
}

/* The inputs at `token`, which may be one of those before the first. */
template <class T>
inline const T *inputs_at(const Inputs<T> &in, const Block<T> &block, int64_t begin, int64_t token, int64_t first) {
    if (token < begin) return block.before + (token - begin + in.width - 1) * CHANNELS;
    return in.x + token * in.x_stride + first;
}

template <class T>
inline void write_state(const Inputs<T> &in, const Block<T> &block, int64_t begin, int64_t end, int64_t first,
                        int64_t count, T *state) {
    const int64_t history = in.width - 1;
    for (int64_t w = 0; w < history; w++) {
        const T *row = inputs_at(in, block, begin, end - history + w, first);
        for (int64_t c = 0; c < count; c++) state[c * history + w] = row[c];
    }
}

/* Tokens [begin, end) of one sequence, channels [first, first + count). */
template <class T>
inline void convolve(const Inputs<T> &in, const Block<T> &block, int64_t begin, int64_t end, int64_t first,
                     int64_t count) {
    for (int64_t token = begin; token < end; token++) {
        const T *rows[MAX_WIDTH];
        for (int64_t w = 0; w < in.width; w++) rows[w] = inputs_at(in, block, begin, token - in.width + 1 + w, first);
        T *out = in.out + token * in.num_channels + first;
        for (int64_t c = 0; c < count; c += LINE / static_cast<int64_t>(sizeof(T)))
            _mm_prefetch(rows[in.width - 1] + TOKENS_AHEAD * in.x_stride + c, _MM_HINT_T0);
        for (int64_t c = 0; c < count; c += WIDTH) {
            const int64_t lanes = count - c < WIDTH ? count - c : WIDTH;
            vec total = load_first(rows[0] + c, lanes) * load(block.taps + c);
            for (int64_t w = 1; w < in.width; w++)
                total = fma(load_first(rows[w] + c, lanes), load(block.taps + w * CHANNELS + c), total);
            store_first(out + c, silu(total), lanes);
        }
    }
}

template <class T>
void run(const Inputs<T> &in, const int64_t *slots, const int32_t *starts, const int32_t *contexts, int64_t num_seqs,
         const int64_t *checkpoints, int64_t num_checkpoints, int64_t threads) {
    const int64_t history = in.width - 1, slot_size = in.num_channels * history;
    const int64_t num_blocks = (in.num_channels + CHANNELS - 1) / CHANNELS;
    parallel(starts[num_seqs] * in.num_channels < SERIAL_VALUES ? 1 : threads, [&](Team team) {
        Block<T> block = {};
        const Range share = team.share(num_blocks);
        for (int64_t b = share.begin; b < share.end; b++) {
            const int64_t first = b * CHANNELS;
            const int64_t count = in.num_channels - first < CHANNELS ? in.num_channels - first : CHANNELS;
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

}  // namespace

MOE_EXPORT(void, moe_causal_conv1d)
(const void *x, int64_t x_stride, const void *weight, void *states, const int64_t *slots, const int32_t *starts,
 const int32_t *contexts, void *out, int64_t num_seqs, const int64_t *checkpoints, int64_t num_checkpoints,
 int64_t num_channels, int64_t width, int64_t is_bf16, int64_t threads) {
    if (is_bf16) {
        const Inputs<bf16> in{static_cast<const bf16 *>(x), x_stride, num_channels, width,
                              static_cast<const bf16 *>(weight), static_cast<bf16 *>(out), static_cast<bf16 *>(states)};
        run(in, slots, starts, contexts, num_seqs, checkpoints, num_checkpoints, threads);
    } else {
        const Inputs<float> in{static_cast<const float *>(x), x_stride, num_channels, width,
                               static_cast<const float *>(weight), static_cast<float *>(out),
                               static_cast<float *>(states)};
        run(in, slots, starts, contexts, num_seqs, checkpoints, num_checkpoints, threads);
    }
}
