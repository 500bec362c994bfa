// out = x * sigmoid(1.702 * x), elementwise; out may be x.
#include "common.h"

template <typename T>
static void quick_gelu(const T* x, T* out, int64_t count) {
#pragma omp parallel for simd if (parallel : count >= kParallelElements)
    for (int64_t i = 0; i < count; i++) {
        float value = widen(x[i]);
        out[i] = narrow<T>(value / (1.0f + exponential(-1.702f * value)));
    }
}

#define EXPORT_QUICK_GELU(name, T) \
    extern "C" void name(const void* x, void* out, int64_t count) { quick_gelu<T>((const T*)x, (T*)out, count); }
EXPORT_QUICK_GELU(quick_gelu_float32, float)
EXPORT_QUICK_GELU(quick_gelu_bfloat16, BFloat16)
EXPORT_QUICK_GELU(quick_gelu_float16, _Float16)
