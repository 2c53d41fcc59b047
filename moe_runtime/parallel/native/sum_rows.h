/* Sums of rows of float32, bfloat16 or float16, made in float32 and rounded once. */
#ifndef MOE_SUM_ROWS_H
#define MOE_SUM_ROWS_H
#include <stdint.h>

/* The Python side knows these numbers. */
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

enum { SUM_BLOCK = 512 }; /* elements whose sums stay in the nearest cache */

typedef union {
    float f;
    uint32_t u;
} bits;

static inline float from_bfloat16(uint16_t v) { return ((bits){.u = (uint32_t)v << 16}).f; }

static inline uint16_t to_bfloat16(float f) {
    bits v = {.f = f};
    uint32_t rounded = (v.u + 0x7fff + ((v.u >> 16) & 1)) >> 16; /* to nearest, ties to even */
    return (v.u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

/* Both conversions of float16 compute every case and then choose, so that loops over them become vector code. */
static inline float from_float16(uint16_t v) {
    uint32_t rest = v & 0x7fff;
    bits small = {.f = (float)(int32_t)rest * 0x1p-24f};  /* below 2^-14, where the exponent's bits are 0 */
    uint32_t normal = (rest << 13) + (112u << 23);        /* the exponents' biases, 127 and 15, differ by 112 */
    uint32_t infinite = 0x7f800000 | (rest & 0x3ff) << 13; /* or not a number */
    uint32_t size = rest < 0x400 ? small.u : rest < 0x7c00 ? normal : infinite;
    return ((bits){.u = (uint32_t)(v & 0x8000) << 16 | size}).f;
}

static inline uint16_t to_float16(float f) {
    bits v = {.f = f};
    uint32_t size = v.u & 0x7fffffff;
    /* Below 2^-14 a unit of the result is 2^-24, as it is of a float between 0.5 and 1: adding 0.5 rounds. */
    bits shifted = {.f = ((bits){.u = size}).f + 0.5f};
    uint32_t small = shifted.u - 0x3f000000;
    uint32_t normal = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
    uint32_t infinite = size > 0x7f800000 ? 0x7e00 : 0x7c00; /* 65520 and more round to infinity */
    uint32_t result = size < 0x38800000 ? small : size < 0x477ff000 ? normal : infinite;
    return (uint16_t)((v.u >> 16 & 0x8000) | result);
}

/* out[width] = rows[0][width] + rows[1][width] + ..., added in this order. */
static void sum_rows(void *out, const void *const *rows, int num_rows, int64_t width, int dtype) {
    float sum[SUM_BLOCK];
    for (int64_t start = 0; start < width; start += SUM_BLOCK) {
        int n = (int)(width - start < SUM_BLOCK ? width - start : SUM_BLOCK);
        for (int i = 0; i < n; i++) sum[i] = 0.0f;
        for (int r = 0; r < num_rows; r++) {
            const float *f = (const float *)rows[r] + start;
            const uint16_t *h = (const uint16_t *)rows[r] + start;
            if (dtype == FLOAT32)
                for (int i = 0; i < n; i++) sum[i] += f[i];
            else if (dtype == BFLOAT16)
                for (int i = 0; i < n; i++) sum[i] += from_bfloat16(h[i]);
            else
                for (int i = 0; i < n; i++) sum[i] += from_float16(h[i]);
        }
        float *f = (float *)out + start;
        uint16_t *h = (uint16_t *)out + start;
        if (dtype == FLOAT32)
            for (int i = 0; i < n; i++) f[i] = sum[i];
        else if (dtype == BFLOAT16)
            for (int i = 0; i < n; i++) h[i] = to_bfloat16(sum[i]);
        else
            for (int i = 0; i < n; i++) h[i] = to_float16(sum[i]);
    }
}

#endif
