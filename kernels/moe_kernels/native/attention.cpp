/* Causal attention over paged keys and values, with a running softmax.
 *
 * The query heads that share a key head, for a block of tokens, are the rows of one small problem: see attention_rows.h.
 */
#include "attention_rows.h"
#include "exports.h"
#include "threads.h"

namespace {

constexpr int64_t FEW_ROWS = 8;           // up to which keys and values are read where they lie
constexpr int64_t SERIAL_WORK = 1 << 17;  // multiplications with keys: a thread is done before a second one has woken

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

template <class T>
inline Places<T> places(const Inputs<T> &in, int64_t index, int64_t kv_head, int64_t key, int64_t count) {
    Places<T> found;
    const int32_t *page = in.block_tables + index * in.table_stride + key / in.block_size;
    int64_t offset = key % in.block_size;
    for (int64_t j = 0; j < KEYS; j++) {
        const int64_t row = ((*page * in.block_size + offset) * in.num_kv_heads + kv_head) * in.head_size;
        found.k[j] = in.k_cache + row;
        found.v[j] = in.v_cache + row;
        if (j + 1 < count && ++offset == in.block_size) {
            offset = 0;
            page++;
        }
    }
    return found;
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
    const bool in_place = rows <= FEW_ROWS && D == stride;
    Places<T> next = places(in, index, kv_head, 0, at_most(KEYS, num_keys));
    for (int64_t key = 0; key < num_keys; key += KEYS) {
        const int64_t count = at_most(KEYS, num_keys - key), seen = before + 1 - key, after = key + KEYS;
        const Places<T> at = next;
        if (after < num_keys) next = places(in, index, kv_head, after, at_most(KEYS, num_keys - after));
        if (in_place) {
            attend_keys<InPlace<T>>(work, at, next, count, seen, rows, group, stride);
        } else {
            const Places<float> copies = widened(at, count, D, stride, work);
            attend_keys<Widened>(work, copies, copies, count, seen, rows, group, stride);
        }
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
        work += tokens * (in.contexts[i] + tokens) * in.num_heads * in.head_size;
    }
    parallel(work < SERIAL_WORK ? 1 : threads, [&](Team team) {
        static thread_local Work memory;
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
