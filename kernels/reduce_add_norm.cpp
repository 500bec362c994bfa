// partial += residual; normed = weight * rms_normed(partial). All rows dense, of `size` elements.
#include "common.h"

template <typename T>
static void add_norm(T* partial, const T* residual, const T* weight, T* normed, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for if (rows * size >= kParallelElements)
    for (int64_t row = 0; row < rows; row++) {
        T* sum = partial + row * size;
        T* out = normed + row * size;
        if (residual) {
            const T* old = residual + row * size;
#pragma omp simd
            for (int64_t i = 0; i < size; i++) sum[i] = narrow<T>(widen(old[i]) + widen(sum[i]));
        }
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < size; i++) squares += widen(sum[i]) * widen(sum[i]);
        float scale = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
#pragma omp simd
        for (int64_t i = 0; i < size; i++) out[i] = narrow<T>(widen(weight[i]) * widen(narrow<T>(widen(sum[i]) * scale)));
    }
}

#define EXPORT_ADD_NORM(name, T)                                                                               \
    extern "C" void name(void* partial, const void* residual, const void* weight, void* normed, int64_t rows,  \
                         int64_t size, float eps) {                                                            \
        add_norm<T>((T*)partial, (const T*)residual, (const T*)weight, (T*)normed, rows, size, eps);           \
    }
EXPORT_ADD_NORM(add_norm_float32, float)
EXPORT_ADD_NORM(add_norm_bfloat16, BFloat16)
EXPORT_ADD_NORM(add_norm_float16, _Float16)
