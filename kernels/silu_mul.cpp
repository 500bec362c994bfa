// out = silu(gate) * up; gate_up rows `stride` apart, the gate in their first `size` elements, up in the next.
#include "common.h"

template <typename T>
static void silu_mul(const T* gate_up, T* out, int64_t rows, int64_t size, int64_t stride) {
#pragma omp parallel for if (rows * size >= kParallelElements)
    for (int64_t row = 0; row < rows; row++) {
        const T* gate = gate_up + row * stride;
        const T* up = gate + size;
        T* to = out + row * size;
#pragma omp simd
        for (int64_t i = 0; i < size; i++) {
            float x = widen(gate[i]);
            to[i] = narrow<T>(x / (1.0f + exponential(-x)) * widen(up[i]));
        }
    }
}

#define EXPORT_SILU_MUL(name, T)                                                                     \
    extern "C" void name(const void* gate_up, void* out, int64_t rows, int64_t size, int64_t stride) { \
        silu_mul<T>((const T*)gate_up, (T*)out, rows, size, stride);                                 \
    }
EXPORT_SILU_MUL(silu_mul_float32, float)
EXPORT_SILU_MUL(silu_mul_bfloat16, BFloat16)
EXPORT_SILU_MUL(silu_mul_float16, _Float16)
