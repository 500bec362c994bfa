// A row of residual add and RMSNorm; see reduce_add_norm.py for the rounding.
#pragma once
#include "common.h"

// Sixteen numbers from memory, and to it: store16 returns what it rounded them to. The instructions are named where
// g++ 12 does not find the best ones by itself.
typedef uint32_t Word16 __attribute__((vector_size(64)));
typedef uint16_t Short16 __attribute__((vector_size(32), aligned(2)));

inline Vector load16(const float* x) { return widen16(x); }
inline Vector load16(const _Float16* x) {
#ifdef __AVX512F__
    return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
#else
    return widen16(x);
#endif
}
inline Vector load16(const BFloat16* x) {
#ifdef __AVX512F__
    return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16);
#else
    return widen16(x);
#endif
}

template <typename T>
inline Vector rounded16(Vector x);
template <>
inline Vector rounded16<float>(Vector x) {
    return x;
}
template <>
inline Vector rounded16<_Float16>(Vector x) {
#ifdef __AVX512F__
    return (Vector)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < 16; i++) x[i] = widen(narrow<_Float16>(x[i]));
    return x;
#endif
}
template <>
inline Vector rounded16<BFloat16>(Vector x) {  // as narrow<BFloat16>
    Word16 word = (Word16)x;
    Word16 rounded = (word + 0x7fffu + ((word >> 16) & 1u)) & 0xffff0000u;
    return (Vector)(x != x ? Word16{} + 0x7fc00000u : rounded);
}

inline Vector store16(float* out, Vector x) {
    *(Vector*)out = x;
    return x;
}
inline Vector store16(_Float16* out, Vector x) {
#ifdef __AVX512F__
    __m256i halves = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256((__m256i*)out, halves);
    return (Vector)_mm512_cvtph_ps(halves);
#else
    for (int i = 0; i < 16; i++) x[i] = widen(out[i] = narrow<_Float16>(x[i]));
    return x;
#endif
}
inline Vector store16(BFloat16* out, Vector x) {
    x = rounded16<BFloat16>(x);
    Word16 upper = (Word16)x >> 16;
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i*)out, _mm512_cvtepi32_epi16((__m512i)upper));
#else
    *(Short16*)out = __builtin_convertvector(upper, Short16);
#endif
    return x;
}

// sum += residual, unless that is null; normed = weight * rms_normed(sum). The order of the sum of squares is written
// out, and there is one copy of the code: a row gives the same bits wherever it lies and whoever calls.
template <typename T>
__attribute__((noinline)) void add_norm_row(T* sum, const T* residual, const T* weight, T* normed, int64_t size,
                                            float eps) {
    Vector lanes = {};
    int64_t whole = size / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16) {
        Vector x = load16(sum + i);
        if (residual) x = store16(sum + i, load16(residual + i) + x);
        lanes += x * x;
    }
    float squares = sum16(lanes);
    for (int64_t i = whole; i < size; i++) {
        if (residual) sum[i] = narrow<T>(widen(residual[i]) + widen(sum[i]));
        squares += widen(sum[i]) * widen(sum[i]);
    }
    float scale = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
    for (int64_t i = 0; i < whole; i += 16) {
        store16(normed + i, load16(weight + i) * rounded16<T>(load16(sum + i) * scale));
    }
    for (int64_t i = whole; i < size; i++) {
        normed[i] = narrow<T>(widen(weight[i]) * widen(narrow<T>(widen(sum[i]) * scale)));
    }
}
