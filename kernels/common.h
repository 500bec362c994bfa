// What the CPU kernels share: their types, their conversions, and exp.
//
// Arithmetic is float32; a result is rounded to its type once, to nearest even. Loops are written so that g++ turns
// them into vector instructions of the machine it runs on. An op is a function template over the type of its tensors,
// exported once a type by EXPORT_*; pointers and strides (in elements) were checked by the caller.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

struct BFloat16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(_Float16 x) { return static_cast<float>(x); }
inline float widen(BFloat16 x) {
    uint32_t word = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

template <typename T>
inline T narrow(float x) {
    return static_cast<T>(x);
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    // A NaN must not be rounded up to an infinity, or past it.
    return BFloat16{static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

// Sixteen numbers at a time, in whatever registers the machine has.
typedef float Vector __attribute__((vector_size(64), aligned(4)));

inline Vector widen16(const float* x) { return *(const Vector*)x; }
inline Vector widen16(const _Float16* x) {
    typedef _Float16 Half __attribute__((vector_size(32), aligned(2)));
    return __builtin_convertvector(*(const Half*)x, Vector);
}
inline Vector widen16(const BFloat16* x) {
    typedef uint16_t Short __attribute__((vector_size(32), aligned(2)));
    typedef uint32_t Word __attribute__((vector_size(64)));
    return (Vector)(__builtin_convertvector(*(const Short*)x, Word) << 16);
}

inline float sum16(Vector x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0.0f;
    for (int i = 0; i < 16; i++) total += x[i];
    return total;
#endif
}

// e^x to about 2e-7 of it (the polynomial of Cephes' expf), from x = -87 on; below that, e^-87. NaN stays NaN.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = std::nearbyint(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    float value = p * r * r + r + 1.0f;
    int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &exponent, sizeof power);
    return value * power;
}

// Below so many elements a second thread costs more than it brings.
constexpr int64_t kParallelElements = 16384;
