// partial += residual; normed = weight * rms_normed(partial). All rows dense, of `size` elements.
#include "add_norm.h"

template <typename T>
static void add_norm(T* partial, const T* residual, const T* weight, T* normed, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for if (rows * size >= kParallelElements)
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row * size;
        add_norm_row<T>(partial + at, residual ? residual + at : nullptr, weight, normed + at, size, eps);
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
