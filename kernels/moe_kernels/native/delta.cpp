/* The gated delta rule: the recurrence itself, a few columns of the state at a time.
 *
 * Columns of the state do not depend on each other: with k and q of a token normalised, column v obeys
 *     u = beta (v - e k S),  S = e S + k u,  out = q S,   e = exp(decay).
 * So a prompt goes through 2 vectors of columns (D x 2 WIDTH values, 16 KB for D = 128 on AVX-512) that stay in the
 * first-level cache for a block of tokens; one sweep applies a token's update and takes the next token's products.
 */
#include "exports.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t MAX_KEY = 256;    // D
constexpr int64_t BLOCK = 64;       // tokens whose keys and queries are normalised at once
constexpr int64_t SERIAL_WORK = 1 << 16;  // values of state to go through
/* Vectors of columns that a decode goes through at once, as many as registers hold the sums of: memory likes whole rows. */
#ifdef __AVX512F__
constexpr int MOST_COLUMNS = 8;
#else
constexpr int MOST_COLUMNS = 4;
#endif

/* q, k [token, key head, D] and v [token, head, V] by their strides; decay, beta [token, head], contiguous. */
template <class T>
struct Inputs {
    const T *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;  // between tokens; heads lie side by side
    const float *decay;
    const T *beta;
    int64_t num_heads, group, key_size, value_size;
    T *out;  // [token, head, V], contiguous
};

/* x / sqrt(sum x^2 + 1e-6) * scale, as float32. */
template <class T>
inline void normalize(const T *x, int64_t size, float scale, float *out) {
    vec squares = zero();
    for (int64_t c = 0; c < size; c += WIDTH) {
        const int64_t count = size - c < WIDTH ? size - c : WIDTH;
        const vec v = load_part(x + c, count);
        squares = fma(v, v, squares);
        store_part(out + c, v, count);
    }
    scale /= __builtin_sqrtf(sum(squares) + 1e-6f);
    for (int64_t c = 0; c < size; c++) out[c] *= scale;
}

/* One token: COLUMNS whole vectors of columns, or one of `count` lanes. */
template <class T, int COLUMNS>
inline void step(const float *k, const float *q, float kq, float e, float beta, float *state, int64_t row,
                 int64_t key_size, const T *v, T *out, int64_t count) {
    vec predicted[COLUMNS] = {}, seen[COLUMNS] = {};
    for (int64_t d = 0; d < key_size; d++) {
        const vec k_d = broadcast(k[d]), q_d = broadcast(q[d]);
        for (int c = 0; c < COLUMNS; c++) {
            const vec s = load_first(state + d * row + c * WIDTH, count);
            predicted[c] = fma(k_d, s, predicted[c]);
            seen[c] = fma(q_d, s, seen[c]);
        }
    }
    vec update[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
        const vec value = load_first(v + c * WIDTH, count);
        update[c] = broadcast(beta) * (value - broadcast(e) * predicted[c]);
        // q S after the update, from q S before it.
        store_first(out + c * WIDTH, fma(broadcast(kq), update[c], broadcast(e) * seen[c]), count);
    }
    for (int64_t d = 0; d < key_size; d++) {
        const vec k_d = broadcast(k[d]);
        for (int c = 0; c < COLUMNS; c++) {
            float *at = state + d * row + c * WIDTH;
            store_first(at, fma(k_d, update[c], broadcast(e) * load_first(at, count)), count);
        }
    }
}

/* A token's share in a block of a prompt. */
struct Gates {
    float e[BLOCK], beta[BLOCK], kq[BLOCK];
};

/* Up to BLOCK tokens through two whole vectors of columns that lie at `state`, 2 * WIDTH values a row. */
template <class T>
inline void run_block(const float *k, const float *q, const Gates &gates, int64_t num_tokens, float *state,
                      int64_t key_size, const T *v, int64_t v_stride, T *out, int64_t out_stride) {
    vec predicted[2] = {}, seen[2] = {};
    for (int64_t d = 0; d < key_size; d++) {
        for (int c = 0; c < 2; c++) {
            const vec s = load(state + (2 * d + c) * WIDTH);
            predicted[c] = fma(broadcast(k[d]), s, predicted[c]);
            seen[c] = fma(broadcast(q[d]), s, seen[c]);
        }
    }
    for (int64_t t = 0; t < num_tokens; t++) {
        const vec e = broadcast(gates.e[t]);
        vec update[2];
        for (int c = 0; c < 2; c++) {
            update[c] = broadcast(gates.beta[t]) * (load(v + t * v_stride + c * WIDTH) - e * predicted[c]);
            store(out + t * out_stride + c * WIDTH, fma(broadcast(gates.kq[t]), update[c], e * seen[c]));
            predicted[c] = seen[c] = zero();
        }
        const float *now = k + t * key_size;
        // The last token has no next one: its own keys do no harm.
        const int64_t next = t + 1 < num_tokens ? t + 1 : t;
        const float *next_k = k + next * key_size, *next_q = q + next * key_size;
        for (int64_t d = 0; d < key_size; d++) {
            for (int c = 0; c < 2; c++) {
                float *at = state + (2 * d + c) * WIDTH;
                const vec s = fma(broadcast(now[d]), update[c], e * load(at));
                store(at, s);
                predicted[c] = fma(broadcast(next_k[d]), s, predicted[c]);
                seen[c] = fma(broadcast(next_q[d]), s, seen[c]);
            }
        }
    }
}

template <class T>
inline void one_token(const Inputs<T> &in, int64_t token, int64_t head, float *state) {
    const int64_t D = in.key_size, V = in.value_size, key_head = head / in.group;
    float k[MAX_KEY], q[MAX_KEY];
    normalize(in.k + token * in.k_stride + key_head * D, D, 1.0f, k);
    normalize(in.q + token * in.q_stride + key_head * D, D, 1.0f / __builtin_sqrtf(static_cast<float>(D)), q);
    float kq = 0.0f;
    for (int64_t d = 0; d < D; d++) kq += k[d] * q[d];
    const float e = __builtin_expf(in.decay[token * in.num_heads + head]);
    const float beta = as_float(in.beta[token * in.num_heads + head]);
    const T *v = in.v + token * in.v_stride + head * V;
    T *out = in.out + (token * in.num_heads + head) * V;
    int64_t column = 0;
    for (; column + MOST_COLUMNS * WIDTH <= V; column += MOST_COLUMNS * WIDTH)
        step<T, MOST_COLUMNS>(k, q, kq, e, beta, state + column, V, D, v + column, out + column, WIDTH);
    for (; column + 4 * WIDTH <= V; column += 4 * WIDTH)
        step<T, 4>(k, q, kq, e, beta, state + column, V, D, v + column, out + column, WIDTH);
    for (; column < V; column += WIDTH) {
        const int64_t count = V - column < WIDTH ? V - column : WIDTH;
        step<T, 1>(k, q, kq, e, beta, state + column, V, D, v + column, out + column, count);
    }
}

/* Tokens [begin, end) of one sequence through one head's state, in place. */
template <class T>
inline void many_tokens(const Inputs<T> &in, int64_t begin, int64_t end, int64_t head, float *state) {
    const int64_t D = in.key_size, V = in.value_size, key_head = head / in.group;
    static thread_local float k[BLOCK * MAX_KEY], q[BLOCK * MAX_KEY], columns[2 * WIDTH * MAX_KEY];
    if (V % (2 * WIDTH) != 0) {
        for (int64_t t = begin; t < end; t++) one_token(in, t, head, state);
        return;
    }
    for (int64_t first = begin; first < end; first += BLOCK) {
        const int64_t count = end - first < BLOCK ? end - first : BLOCK;
        Gates gates;
        for (int64_t t = 0; t < count; t++) {
            const int64_t token = first + t;
            float *k_t = k + t * D, *q_t = q + t * D;
            normalize(in.k + token * in.k_stride + key_head * D, D, 1.0f, k_t);
            normalize(in.q + token * in.q_stride + key_head * D, D, 1.0f / __builtin_sqrtf(static_cast<float>(D)), q_t);
            gates.kq[t] = 0.0f;
            for (int64_t d = 0; d < D; d++) gates.kq[t] += k_t[d] * q_t[d];
            gates.e[t] = __builtin_expf(in.decay[token * in.num_heads + head]);
            gates.beta[t] = as_float(in.beta[token * in.num_heads + head]);
        }
        for (int64_t column = 0; column < V; column += 2 * WIDTH) {
            for (int64_t d = 0; d < D; d++)
                memcpy(columns + 2 * WIDTH * d, state + d * V + column, 2 * WIDTH * sizeof(float));
            run_block(k, q, gates, count, columns, D, in.v + first * in.v_stride + head * V + column, in.v_stride,
                      in.out + (first * in.num_heads + head) * V + column, in.num_heads * V);
            for (int64_t d = 0; d < D; d++)
                memcpy(state + d * V + column, columns + 2 * WIDTH * d, 2 * WIDTH * sizeof(float));
        }
    }
}

/* A (sequence, head) after the decodes: state from its slot or zero, copies of it where checkpoints want them. */
template <class T>
inline void prefill(const Inputs<T> &in, int64_t index, int64_t head, int64_t begin, int64_t end, bool has_context,
                    float *states, int64_t slot, const int64_t *checkpoints, int64_t num_checkpoints) {
    const int64_t size = in.key_size * in.value_size, slot_size = in.num_heads * size;
    float *state = states + slot * slot_size + head * size;
    if (!has_context) memset(state, 0, static_cast<size_t>(size) * sizeof(float));
    int64_t at = begin;
    for (int64_t c = 0; c < num_checkpoints; c++) {
        if (checkpoints[3 * c] != index) continue;
        many_tokens(in, at, begin + checkpoints[3 * c + 1], head, state);
        at = begin + checkpoints[3 * c + 1];
        memcpy(states + checkpoints[3 * c + 2] * slot_size + head * size, state, static_cast<size_t>(size) * sizeof(float));
    }
    many_tokens(in, at, end, head, state);
}

template <class T>
void run(const Inputs<T> &in, float *states, const int64_t *slots, const int32_t *starts, const int32_t *contexts,
         int64_t num_seqs, int64_t num_decodes, const int64_t *checkpoints, int64_t num_checkpoints, int64_t threads) {
    const int64_t size = in.key_size * in.value_size;
    const int64_t work = starts[num_seqs] * in.num_heads * size;
    parallel(work < SERIAL_WORK ? 1 : threads, [&](Team team) {
        const Range decodes = team.share(num_decodes * in.num_heads);
        for (int64_t item = decodes.begin; item < decodes.end; item++) {
            const int64_t i = item / in.num_heads, head = item % in.num_heads;
            one_token(in, i, head, states + (slots[i] * in.num_heads + head) * size);
        }
        for (int64_t i = num_decodes; i < num_seqs; i++) {
            if (starts[i + 1] == starts[i]) continue;
            const Range heads = team.share(in.num_heads);
            for (int64_t head = heads.begin; head < heads.end; head++)
                prefill(in, i, head, starts[i], starts[i + 1], contexts[i] > 0, states, slots[i], checkpoints,
                        num_checkpoints);
        }
    });
}

/* A vector of heads after the other, so that what belongs to a head is made once. */
template <class T>
void gates(const T *a, int64_t a_stride, const T *b, int64_t b_stride, const float *a_log, const float *dt_bias,
           int64_t num_tokens, int64_t num_heads, float *decay, T *beta) {
    for_vectors(num_heads, [&](int64_t n, int64_t count) {
        const vec rate = zero() - exp(load_first(a_log + n, count)), bias = load_first(dt_bias + n, count);
        for (int64_t t = 0; t < num_tokens; t++) {
            const vec step = softplus(load_first(a + t * a_stride + n, count) + bias);
            store_first(decay + t * num_heads + n, rate * step, count);
            store_first(beta + t * num_heads + n, sigmoid(load_first(b + t * b_stride + n, count)), count);
        }
    });
}

}  // namespace

MOE_EXPORT(void, moe_gated_delta_rule)
(const void *q, int64_t q_stride, const void *k, int64_t k_stride, const void *v, int64_t v_stride, const float *decay,
 const void *beta, float *states, const int64_t *slots, const int32_t *starts, const int32_t *contexts, void *out,
 int64_t num_seqs, int64_t num_decodes, const int64_t *checkpoints, int64_t num_checkpoints, int64_t num_heads,
 int64_t group, int64_t key_size, int64_t value_size, int64_t is_bf16, int64_t threads) {
    if (is_bf16) {
        const Inputs<bf16> in{static_cast<const bf16 *>(q), static_cast<const bf16 *>(k), static_cast<const bf16 *>(v),
                              q_stride, k_stride, v_stride, decay, static_cast<const bf16 *>(beta), num_heads, group,
                              key_size, value_size, static_cast<bf16 *>(out)};
        run(in, states, slots, starts, contexts, num_seqs, num_decodes, checkpoints, num_checkpoints, threads);
    } else {
        const Inputs<float> in{static_cast<const float *>(q), static_cast<const float *>(k),
                               static_cast<const float *>(v), q_stride, k_stride, v_stride, decay,
                               static_cast<const float *>(beta), num_heads, group, key_size, value_size,
                               static_cast<float *>(out)};
        run(in, states, slots, starts, contexts, num_seqs, num_decodes, checkpoints, num_checkpoints, threads);
    }
}

MOE_EXPORT(void, moe_delta_gates)
(const void *a, int64_t a_stride, const void *b, int64_t b_stride, const float *a_log, const float *dt_bias,
 int64_t num_tokens, int64_t num_heads, float *decay, void *beta, int64_t is_bf16) {
    if (is_bf16) {
        gates(static_cast<const bf16 *>(a), a_stride, static_cast<const bf16 *>(b), b_stride, a_log, dt_bias,
              num_tokens, num_heads, decay, static_cast<bf16 *>(beta));
    } else {
        gates(static_cast<const float *>(a), a_stride, static_cast<const float *>(b), b_stride, a_log, dt_bias,
              num_tokens, num_heads, decay, static_cast<float *>(beta));
    }
}
