/* Causal attention over paged keys and values, with a running softmax.
 *
 * The query heads that share a key head, for a block of tokens, are the rows of one small problem: ROWS queries of D
 * values against KEYS keys at a time, all as float32 in the first two levels of cache.
 */
#include "exports.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t ROWS = 32, KEYS = 16, MAX_HEAD = 256;
constexpr int K_BLOCK = 4;
constexpr int64_t SERIAL_WORK = 1 << 15;  // keys times rows

template <class T>
struct Inputs {
    const T *q;
    int64_t q_stride;  // between tokens; heads lie side by side
    const T *k, *v;
    int64_t k_stride, v_stride;
    T *k_cache, *v_cache;  // [block, offset, key head, D]
    const int64_t *kv_slots;
    const int32_t *block_tables;
    int64_t table_stride, block_size;
    const int32_t *starts, *contexts;
    const T *gate;  // or null
    int64_t gate_stride;
    T *out;  // [token, head, D], contiguous
    int64_t num_heads, num_kv_heads, head_size;
    float scale;
};

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

/* scores[R, K] of a block of R_BLOCK rows and K_BLOCK keys. */
template <int R_BLOCK>
inline void dot_block(const float *q, const float *k, int64_t stride, float *scores) {
    vec sums[R_BLOCK][K_BLOCK] = {};
    for (int64_t d = 0; d < stride; d += WIDTH) {
        vec keys[K_BLOCK];
        for (int j = 0; j < K_BLOCK; j++) keys[j] = load(k + j * stride + d);
        for (int r = 0; r < R_BLOCK; r++) {
            const vec query = load(q + r * stride + d);
            for (int j = 0; j < K_BLOCK; j++) sums[r][j] = fma(query, keys[j], sums[r][j]);
        }
    }
    for (int r = 0; r < R_BLOCK; r++)
        _mm_storeu_ps(scores + r * KEYS, sum_four(sums[r][0], sums[r][1], sums[r][2], sums[r][3]));
}

/* out += scores v, for COLUMNS vectors of R_BLOCK rows. */
template <int R_BLOCK, int COLUMNS>
inline void add_values(const float *scores, const float *v, int64_t stride, int64_t num_keys, float *out) {
    vec sums[R_BLOCK][COLUMNS];
    for (int r = 0; r < R_BLOCK; r++)
        for (int c = 0; c < COLUMNS; c++) sums[r][c] = load(out + r * stride + c * WIDTH);
    for (int64_t j = 0; j < num_keys; j++) {
        vec values[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) values[c] = load(v + j * stride + c * WIDTH);
        for (int r = 0; r < R_BLOCK; r++) {
            const vec p = broadcast(scores[r * KEYS + j]);
            for (int c = 0; c < COLUMNS; c++) sums[r][c] = fma(p, values[c], sums[r][c]);
        }
    }
    for (int r = 0; r < R_BLOCK; r++)
        for (int c = 0; c < COLUMNS; c++) store(out + r * stride + c * WIDTH, sums[r][c]);
}

template <int R_BLOCK>
inline void value_block(const float *scores, const float *v, int64_t stride, int64_t num_keys, float *out) {
    int64_t d = 0;
    for (; d + 2 * WIDTH <= stride; d += 2 * WIDTH) add_values<R_BLOCK, 2>(scores, v + d, stride, num_keys, out + d);
    if (d < stride) add_values<R_BLOCK, 1>(scores, v + d, stride, num_keys, out + d);
}

/* The softmax of a row so far, with KEYS more scores, which become weights; scales what the row has summed. */
inline void soften(Work &work, int64_t row, int64_t allowed, int64_t stride) {
    float *scores = work.scores + row * KEYS;
    for (int64_t j = allowed < 0 ? 0 : allowed; j < KEYS; j++) scores[j] = -__builtin_inff();
    float highest = work.largest[row];
    for (int64_t j = 0; j < KEYS; j++) highest = scores[j] > highest ? scores[j] : highest;
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

/* Tokens [first, last) of one sequence, for one key head. */
template <class T>
inline void attend(const Inputs<T> &in, int64_t index, int64_t kv_head, int64_t first, int64_t last, Work &work) {
    const int64_t group = in.num_heads / in.num_kv_heads, D = in.head_size;
    const int64_t stride = (D + WIDTH - 1) / WIDTH * WIDTH, rows = (last - first) * group;
    const int64_t before = in.contexts[index] + first - in.starts[index];  // keys before the first token
    for (int64_t r = 0; r < rows; r++) {
        const T *q = in.q + (first + r / group) * in.q_stride + (kv_head * group + r % group) * D;
        widen(q, D, in.scale, work.q + r * stride);
        work.largest[r] = -__builtin_inff();
        work.total[r] = 0.0f;
    }
    memset(work.out, 0, static_cast<size_t>(rows * stride) * sizeof(float));
    const int64_t num_keys = before + last - first;
    for (int64_t key = 0; key < num_keys; key += KEYS) {
        const int64_t count = num_keys - key < KEYS ? num_keys - key : KEYS;
        for (int64_t j = 0; j < count; j++) {
            const int64_t page = in.block_tables[index * in.table_stride + (key + j) / in.block_size];
            const int64_t at = (page * in.block_size + (key + j) % in.block_size) * in.num_kv_heads + kv_head;
            widen(in.k_cache + at * D, D, 1.0f, work.k + j * stride);
            widen(in.v_cache + at * D, D, 1.0f, work.v + j * stride);
        }
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4)
            for (int64_t j = 0; j < KEYS; j += K_BLOCK)
                dot_block<4>(work.q + r * stride, work.k + j * stride, stride, work.scores + r * KEYS + j);
        for (; r < rows; r++)
            for (int64_t j = 0; j < KEYS; j += K_BLOCK)
                dot_block<1>(work.q + r * stride, work.k + j * stride, stride, work.scores + r * KEYS + j);
        for (r = 0; r < rows; r++) {
            const int64_t seen = before + r / group + 1 - key;  // keys of this block that the row may see
            soften(work, r, seen < count ? seen : count, stride);
        }
        for (r = 0; r + 4 <= rows; r += 4)
            value_block<4>(work.scores + r * KEYS, work.v, stride, count, work.out + r * stride);
        for (; r < rows; r++) value_block<1>(work.scores + r * KEYS, work.v, stride, count, work.out + r * stride);
    }
    for (int64_t r = 0; r < rows; r++) {
        const int64_t token = first + r / group, head = kv_head * group + r % group;
        const vec share = broadcast(1.0f / work.total[r]);
        for (int64_t d = 0; d < D; d += WIDTH) {
            const int64_t lanes = D - d < WIDTH ? D - d : WIDTH;
            vec x = load(work.out + r * stride + d) * share;
            if (in.gate) x = x * sigmoid(load_first(in.gate + token * in.gate_stride + head * D + d, lanes));
            store_first(in.out + (token * in.num_heads + head) * D + d, x, lanes);
        }
    }
}

template <class T>
inline void write_caches(const Inputs<T> &in, Range tokens) {
    const int64_t size = in.num_kv_heads * in.head_size;
    for (int64_t t = tokens.begin; t < tokens.end; t++) {
        memcpy(in.k_cache + in.kv_slots[t] * size, in.k + t * in.k_stride, static_cast<size_t>(size) * sizeof(T));
        memcpy(in.v_cache + in.kv_slots[t] * size, in.v + t * in.v_stride, static_cast<size_t>(size) * sizeof(T));
    }
}

/* Threads take blocks of tokens in turn, so that the long rows at a prompt's end are spread. */
template <class T>
void run(const Inputs<T> &in, int64_t num_seqs, int64_t threads) {
    const int64_t group = in.num_heads / in.num_kv_heads, tokens_at_once = ROWS / group;
    int64_t work = 0;
    for (int64_t i = 0; i < num_seqs; i++) {
        const int64_t tokens = in.starts[i + 1] - in.starts[i];
        work += tokens * (in.contexts[i] + tokens) * in.num_heads;
    }
    parallel(work < SERIAL_WORK ? 1 : threads, [&](Team team) {
        static thread_local Work memory;
        // Keys past the last of a block are not read, but what lies there is multiplied by zero: no NaN.
        memset(memory.k, 0, sizeof memory.k);
        memset(memory.v, 0, sizeof memory.v);
        write_caches(in, team.share(in.starts[num_seqs]));
        team.barrier();
        int64_t item = 0;
        for (int64_t i = 0; i < num_seqs; i++) {
            for (int64_t first = in.starts[i]; first < in.starts[i + 1]; first += tokens_at_once) {
                const int64_t end = in.starts[i + 1];
                const int64_t last = first + tokens_at_once < end ? first + tokens_at_once : end;
                for (int64_t head = 0; head < in.num_kv_heads; head++, item++)
                    if (item % team.size == team.index) attend(in, i, head, first, last, memory);
            }
        }
    });
}

template <class T>
Inputs<T> typed(const void *const *pointers, const int64_t *strides, const int64_t *slots, const int32_t *tables,
                const int32_t *starts, const int32_t *contexts, const int64_t *sizes, float scale) {
    const auto in = [&](int i) { return static_cast<const T *>(pointers[i]); };
    const auto out = [&](int i) { return static_cast<T *>(const_cast<void *>(pointers[i])); };
    return {in(0), strides[0], in(1), in(2), strides[1], strides[2], out(3), out(4), slots, tables, strides[3], sizes[0],
            starts, contexts, in(5), strides[4], out(6), sizes[1], sizes[2], sizes[3], scale};
}

}  // namespace

/* pointers: q, k, v, k_cache, v_cache, gate (or null), out. strides: between tokens of q, k and v, between rows of the
 * block tables, between tokens of gate. sizes: block size, heads, key heads, head size. */
MOE_EXPORT(void, moe_paged_attention)
(const void *const *pointers, const int64_t *strides, const int64_t *slots, const int32_t *tables,
 const int32_t *starts, const int32_t *contexts, const int64_t *sizes, float scale, int64_t num_seqs, int64_t is_bf16,
 int64_t threads) {
    if (is_bf16) {
        run(typed<bf16>(pointers, strides, slots, tables, starts, contexts, sizes, scale), num_seqs, threads);
    } else {
        run(typed<float>(pointers, strides, slots, tables, starts, contexts, sizes, scale), num_seqs, threads);
    }
}
