/* Vectors of float32, as wide as the instruction set has them, and how bfloat16 and int8 become float32.
 *
 * A vector has WIDTH lanes. `*_part` functions touch the first `count` lanes alone (0 <= count <= WIDTH) and read the
 * others as zero, so a row may end at the end of its allocation.
 */
#pragma once

#include <immintrin.h>

#include <cstring>

#include "level.h"

namespace {

constexpr int64_t LINE = 64;  // bytes of a cache line

struct bf16 {
    uint16_t bits;
};

#ifdef __AVX512F__

using vec = __m512;
constexpr int64_t WIDTH = 16;

inline vec zero() { return _mm512_setzero_ps(); }
inline vec broadcast(float x) { return _mm512_set1_ps(x); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline vec max(vec a, vec b) { return _mm512_max_ps(a, b); }
inline vec min(vec a, vec b) { return _mm512_min_ps(a, b); }
inline vec sqrt(vec a) { return _mm512_sqrt_ps(a); }
/* Bit i: a's lane i is larger than b's. */
inline uint32_t lanes_above(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline float sum(vec a) { return _mm512_reduce_add_ps(a); }
inline float largest(vec a) { return _mm512_reduce_max_ps(a); }
inline vec round_to_even(vec a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* a * 2^n for whole numbers n. */
inline vec scale_by_power(vec a, vec n) { return _mm512_scalef_ps(a, n); }

inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

inline vec widen_bf16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline vec widen_int8(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }

inline vec load(const float *p) { return _mm512_loadu_ps(p); }
inline vec load(const bf16 *p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
inline vec load(const int8_t *p) { return widen_int8(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
inline vec load_part(const float *p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline vec load_part(const bf16 *p, int64_t count) {
    return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
inline vec load_part(const int8_t *p, int64_t count) {
    return widen_int8(_mm_maskz_loadu_epi8(first_lanes(count), p));
}

/* Rounded to nearest, ties to even, as torch does; any NaN stays one. */
#ifdef __AVX512BF16__
/* One instruction for nine. It takes denormal numbers for 0, as this level's products of bfloat16 do. */
inline __m256i narrow(vec a) { return (__m256i)_mm512_cvtneps_pbh(a); }
#else
inline __m256i narrow(vec a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(rounded, 16);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(high, is_nan, _mm512_set1_epi32(0x7fc0)));
}
#endif
inline void store(float *p, vec a) { _mm512_storeu_ps(p, a); }
inline void store(bf16 *p, vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), narrow(a)); }
inline void store_part(float *p, vec a, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), a); }
inline void store_part(bf16 *p, vec a, int64_t count) {
    _mm256_mask_storeu_epi16(p, first_lanes(count), narrow(a));
}

#else

using vec = __m256;
constexpr int64_t WIDTH = 8;

inline vec zero() { return _mm256_setzero_ps(); }
inline vec broadcast(float x) { return _mm256_set1_ps(x); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline vec max(vec a, vec b) { return _mm256_max_ps(a, b); }
inline vec min(vec a, vec b) { return _mm256_min_ps(a, b); }
inline vec sqrt(vec a) { return _mm256_sqrt_ps(a); }
/* Bit i: a's lane i is larger than b's. */
inline uint32_t lanes_above(vec a, vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
inline float sum(vec a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float largest(vec a) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline vec round_to_even(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* a * 2^n for whole numbers n from -126 to 127. */
inline vec scale_by_power(vec a, vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

inline vec widen_bf16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline vec widen_int8(__m128i codes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)); }

inline vec load(const float *p) { return _mm256_loadu_ps(p); }
inline vec load(const bf16 *p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
inline vec load(const int8_t *p) { return widen_int8(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))); }
template <class T>
inline vec load_part(const T *p, int64_t count) {
    T whole[WIDTH] = {};
    memcpy(whole, p, static_cast<size_t>(count) * sizeof(T));
    return load(whole);
}

/* Rounded to nearest, ties to even, as torch does; any NaN becomes the one quiet NaN. */
inline __m128i narrow(vec a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(rounded, 16);
    const __m256i chosen = _mm256_blendv_epi8(high, _mm256_set1_epi32(0x7fc0), is_nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
}
inline void store(float *p, vec a) { _mm256_storeu_ps(p, a); }
inline void store(bf16 *p, vec a) { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), narrow(a)); }
template <class T>
inline void store_part(T *p, vec a, int64_t count) {
    T whole[WIDTH];
    store(whole, a);
    memcpy(p, whole, static_cast<size_t>(count) * sizeof(T));
}

#endif

#ifdef __AVX512F__
/* Sums of four lanes each: [four lanes][a, b, c, d]. */
inline vec sum_in_fours(vec a, vec b, vec c, vec d) {
    const vec ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const vec cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    return _mm512_castpd_ps(low) + _mm512_castpd_ps(high);
}
#endif

/* The sums across the lanes of four vectors. */
inline __m128 sum_four(vec a, vec b, vec c, vec d) {
#ifdef __AVX512F__
    const vec abcd = sum_in_fours(a, b, c, d);
    const __m256 half = _mm512_castps512_ps256(abcd) + _mm512_extractf32x8_ps(abcd, 1);
#else
    const vec half = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
#endif
    return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}

/* The first `count` lanes, at less cost if they are all: AVX2 has no fast loads and stores of a part. */
template <class T>
inline vec load_first(const T *p, int64_t count) {
    return count == WIDTH ? load(p) : load_part(p, count);
}
template <class T>
inline void store_first(T *p, vec x, int64_t count) {
    count == WIDTH ? store(p, x) : store_part(p, x, count);
}

/* Call body(first, count) for each vector of `size` values: one copy of it knows that all lanes count, one takes the
 * rest. */
template <class Body>
inline void for_vectors(int64_t size, const Body &body) {
    int64_t c = 0;
    for (; c + WIDTH <= size; c += WIDTH) body(c, WIDTH);
    if (c < size) body(c, size - c);
}

/* Calls `body(first, count)` for as few groups of rows of about one size as hold `at_once` at the most. */
template <class Body>
inline void for_row_groups(int64_t num_rows, int64_t at_once, const Body &body) {
    int64_t row = 0;
    for (int64_t groups = (num_rows + at_once - 1) / at_once; groups > 0; groups--) {
        const int64_t rows = (num_rows - row + groups - 1) / groups;
        body(row, rows);
        row += rows;
    }
}

/* What x becomes when it is kept as a T. */
template <class T>
inline vec rounded(vec x) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return x;
    } else {
        return widen_bf16(narrow(x));
    }
}

/* e^x within 2 units in the last place; as for -87.3 (1.2e-38) below that, and as for 88.3 (2^127.4) above, so neither
 * denormal numbers nor infinities. */
inline vec exp(vec x) {
    // In this order of operands a NaN stays one: both instructions return the second if either is.
    const vec clamped = min(broadcast(88.3f), max(broadcast(-87.3f), x));
    // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, the first so short that n times it is exact.
    const vec n = round_to_even(clamped * broadcast(1.44269504f));
    vec r = fma(n, broadcast(-0.693359375f), clamped);
    r = fma(n, broadcast(2.12194440e-4f), r);
    vec e = broadcast(1.0f / 5040);  // Taylor's series: the first term left out is below 6e-9
    e = fma(e, r, broadcast(1.0f / 720));
    e = fma(e, r, broadcast(1.0f / 120));
    e = fma(e, r, broadcast(1.0f / 24));
    e = fma(e, r, broadcast(1.0f / 6));
    e = fma(e, r, broadcast(0.5f));
    e = fma(e, r, broadcast(1.0f));
    e = fma(e, r, broadcast(1.0f));
    return scale_by_power(e, n);
}

inline vec sigmoid(vec x) { return broadcast(1.0f) / (broadcast(1.0f) + exp(zero() - x)); }
inline vec silu(vec x) { return x / (broadcast(1.0f) + exp(zero() - x)); }

/* log(1 + e^x) with a relative error below 3e-7; no less than 1.2e-38. */
inline vec softplus(vec x) {
    // log(1 + e^x) = max(x, 0) + log(1 + y) with y = e^-|x|, and log(1 + y) = 2 atanh(s) with s = y / (2 + y) <= 1/3.
    const vec y = exp(min(zero() - x, x));
    const vec s = y / (broadcast(2.0f) + y), z = s * s;
    vec series = broadcast(1.0f / 13);  // of atanh(s) / s: the first term left out is below 1.4e-8
    series = fma(series, z, broadcast(1.0f / 11));
    series = fma(series, z, broadcast(1.0f / 9));
    series = fma(series, z, broadcast(1.0f / 7));
    series = fma(series, z, broadcast(1.0f / 5));
    series = fma(series, z, broadcast(1.0f / 3));
    series = fma(series, z, broadcast(1.0f));
    return fma(s + s, series, max(zero(), x));
}

inline float as_float(float x) { return x; }
inline float as_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace
