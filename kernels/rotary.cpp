// out = x with the two halves of its first `rotary_dim` entries rotated; out is dense, x's heads are.
#include "common.h"

template <typename T>
static void rotate(const T* x, T* out, const T* cosines, const T* sines, int64_t tokens, int64_t heads, int64_t dim,
                   int64_t rotary_dim, int64_t token_stride, int64_t head_stride) {
    int64_t half = rotary_dim / 2;
#pragma omp parallel for if (tokens * heads * dim >= kParallelElements)
    for (int64_t token = 0; token < tokens; token++) {
        const T* cos = cosines + token * rotary_dim;
        const T* sin = sines + token * rotary_dim;
        for (int64_t head = 0; head < heads; head++) {
            const T* from = x + token * token_stride + head * head_stride;
            T* to = out + (token * heads + head) * dim;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float first = widen(from[i]), second = widen(from[half + i]);
                to[i] = narrow<T>(first * widen(cos[i]) - second * widen(sin[i]));
                to[half + i] = narrow<T>(second * widen(cos[half + i]) + first * widen(sin[half + i]));
            }
            for (int64_t i = rotary_dim; i < dim; i++) to[i] = from[i];
        }
    }
}

#define EXPORT_ROTARY(name, T)                                                                                    \
    extern "C" void name(const void* x, void* out, const void* cosines, const void* sines, int64_t tokens,        \
                         int64_t heads, int64_t dim, int64_t rotary_dim, int64_t token_stride,                    \
                         int64_t head_stride) {                                                                   \
        rotate<T>((const T*)x, (T*)out, (const T*)cosines, (const T*)sines, tokens, heads, dim, rotary_dim,       \
                  token_stride, head_stride);                                                                     \
    }
EXPORT_ROTARY(rotary_float32, float)
EXPORT_ROTARY(rotary_bfloat16, BFloat16)
EXPORT_ROTARY(rotary_float16, _Float16)
