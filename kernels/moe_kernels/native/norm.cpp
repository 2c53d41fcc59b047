/* Root-mean-square norms, SiLU products and rotary positions: one pass over each row. */
#include "exports.h"
#include "simd.h"
#include "threads.h"

namespace {

/* Values that a thread should have at least, for a region to pay. */
constexpr int64_t SERIAL_VALUES = 32768;

/* Rows that lie in two dimensions: row (o, i) at o * outer_stride + i * inner_stride. */
struct Rows {
    int64_t inner, outer_stride, inner_stride;

    int64_t at(int64_t row) const { return row / inner * outer_stride + row % inner * inner_stride; }
};

template <class T>
inline float inverse_rms(const T *x, int64_t size, float eps) {
    vec squares[4] = {};  // one sum would be as slow as additions that wait for each other
    int64_t c = 0;
    for (; c + 4 * WIDTH <= size; c += 4 * WIDTH) {
        for (int i = 0; i < 4; i++) {
            const vec v = load(x + c + i * WIDTH);
            squares[i] = fma(v, v, squares[i]);
        }
    }
    for_vectors(size - c, [&](int64_t at, int64_t count) {
        const vec v = load_first(x + c + at, count);
        squares[0] = fma(v, v, squares[0]);
    });
    const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    return 1.0f / __builtin_sqrtf(total / static_cast<float>(size) + eps);
}

template <class T>
void rms_norm(const T *x, Rows rows, const T *weight, float eps, float shift, T *out, int64_t num_rows, int64_t size,
              int64_t threads) {
    parallel(num_rows * size < SERIAL_VALUES ? 1 : threads, [&](Team team) {
        const Range share = team.share(num_rows);
        for (int64_t r = share.begin; r < share.end; r++) {
            const T *from = x + rows.at(r);
            T *to = out + r * size;
            const vec inverse = broadcast(inverse_rms(from, size, eps));
            for_vectors(size, [&](int64_t c, int64_t count) {
                const vec scale = load_first(weight + c, count) + broadcast(shift);
                store_first(to + c, load_first(from + c, count) * inverse * scale, count);
            });
        }
    });
}

template <class T>
void rms_norm_gated(const T *x, Rows x_rows, const T *gate, Rows gate_rows, const T *weight, float eps, T *out,
                    int64_t num_rows, int64_t size, int64_t threads) {
    parallel(num_rows * size < SERIAL_VALUES ? 1 : threads, [&](Team team) {
        const Range share = team.share(num_rows);
        for (int64_t r = share.begin; r < share.end; r++) {
            const T *from = x + x_rows.at(r), *by = gate + gate_rows.at(r);
            T *to = out + r * size;
            const vec inverse = broadcast(inverse_rms(from, size, eps));
            for_vectors(size, [&](int64_t c, int64_t count) {
                const vec normed = rounded<T>(load_first(from + c, count) * inverse);
                const vec scaled = rounded<T>(normed * load_first(weight + c, count));
                store_first(to + c, scaled * silu(load_first(by + c, count)), count);
            });
        }
    });
}

template <class T>
void silu_and_mul(const T *x, int64_t stride, T *out, int64_t num_rows, int64_t size, int64_t threads) {
    parallel(num_rows * size < SERIAL_VALUES ? 1 : threads, [&](Team team) {
        const Range share = team.share(num_rows);
        for (int64_t r = share.begin; r < share.end; r++) {
            const T *gate = x + r * stride, *up = gate + size;
            T *to = out + r * size;
            for_vectors(size, [&](int64_t c, int64_t count) {
                store_first(to + c, rounded<T>(silu(load_first(gate + c, count))) * load_first(up + c, count), count);
            });
        }
    });
}

/* One row of D values, of which the first `turned` are turned by the angles of a token. */
template <class T>
inline void turn(const T *x, const T *cosine, const T *sine, int64_t turned, int64_t size, T *out) {
    const int64_t half = turned / 2;
    for_vectors(half, [&](int64_t c, int64_t count) {
        const vec first = load_first(x + c, count), second = load_first(x + half + c, count);
        const vec low = first * load_first(cosine + c, count) - second * load_first(sine + c, count);
        const vec high = second * load_first(cosine + half + c, count) + first * load_first(sine + half + c, count);
        store_first(out + c, low, count);
        store_first(out + half + c, high, count);
    });
    memcpy(out + turned, x + turned, static_cast<size_t>(size - turned) * sizeof(T));
}

template <class T>
void apply_rotary(const T *x, Rows rows, const T *cosine, const T *sine, int64_t turned, T *out, int64_t num_rows,
                  int64_t size, int64_t threads) {
    parallel(num_rows * size < SERIAL_VALUES ? 1 : threads, [&](Team team) {
        const Range share = team.share(num_rows);
        for (int64_t r = share.begin; r < share.end; r++) {
            const int64_t token = r / rows.inner;
            turn(x + rows.at(r), cosine + token * turned, sine + token * turned, turned, size, out + r * size);
        }
    });
}

}  // namespace

/* Exports take `is_bf16` for the type of every tensor but where stated; rows as (inner, outer stride, inner stride). */

MOE_EXPORT(void, moe_rms_norm)
(const void *x, int64_t inner, int64_t outer_stride, int64_t inner_stride, const void *weight, float eps, float shift,
 void *out, int64_t num_rows, int64_t size, int64_t is_bf16, int64_t threads) {
    const Rows rows{inner, outer_stride, inner_stride};
    if (is_bf16) {
        rms_norm(static_cast<const bf16 *>(x), rows, static_cast<const bf16 *>(weight), eps, shift,
                 static_cast<bf16 *>(out), num_rows, size, threads);
    } else {
        rms_norm(static_cast<const float *>(x), rows, static_cast<const float *>(weight), eps, shift,
                 static_cast<float *>(out), num_rows, size, threads);
    }
}

MOE_EXPORT(void, moe_rms_norm_gated)
(const void *x, int64_t inner, int64_t outer_stride, int64_t inner_stride, const void *gate, int64_t gate_outer_stride,
 int64_t gate_inner_stride, const void *weight, float eps, void *out, int64_t num_rows, int64_t size, int64_t is_bf16,
 int64_t threads) {
    const Rows rows{inner, outer_stride, inner_stride}, gates{inner, gate_outer_stride, gate_inner_stride};
    if (is_bf16) {
        rms_norm_gated(static_cast<const bf16 *>(x), rows, static_cast<const bf16 *>(gate), gates,
                       static_cast<const bf16 *>(weight), eps, static_cast<bf16 *>(out), num_rows, size, threads);
    } else {
        rms_norm_gated(static_cast<const float *>(x), rows, static_cast<const float *>(gate), gates,
                       static_cast<const float *>(weight), eps, static_cast<float *>(out), num_rows, size, threads);
    }
}

MOE_EXPORT(void, moe_silu_and_mul)
(const void *x, int64_t stride, void *out, int64_t num_rows, int64_t size, int64_t is_bf16, int64_t threads) {
    if (is_bf16) {
        silu_and_mul(static_cast<const bf16 *>(x), stride, static_cast<bf16 *>(out), num_rows, size, threads);
    } else {
        silu_and_mul(static_cast<const float *>(x), stride, static_cast<float *>(out), num_rows, size, threads);
    }
}

MOE_EXPORT(void, moe_apply_rotary)
(const void *x, int64_t inner, int64_t outer_stride, int64_t inner_stride, const void *cosine, const void *sine,
 int64_t turned, void *out, int64_t num_rows, int64_t size, int64_t is_bf16, int64_t threads) {
    const Rows rows{inner, outer_stride, inner_stride};
    if (is_bf16) {
        apply_rotary(static_cast<const bf16 *>(x), rows, static_cast<const bf16 *>(cosine),
                     static_cast<const bf16 *>(sine), turned, static_cast<bf16 *>(out), num_rows, size, threads);
    } else {
        apply_rotary(static_cast<const float *>(x), rows, static_cast<const float *>(cosine),
                     static_cast<const float *>(sine), turned, static_cast<float *>(out), num_rows, size, threads);
    }
}
