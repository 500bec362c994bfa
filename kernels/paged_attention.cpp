// Attention of single tokens over the block-table cache, read in place: one task a sequence and KV head.
#include <algorithm>
#include <vector>

#include "common.h"

struct Shape {
    int64_t heads, kv_heads, block_size, table_stride, token_stride, head_stride;
    float scale;
};

// D: the size of a head where it is known to the compiler, else 0.
template <typename T, int D>
static void attend(const T* q, const T* keys, const T* values, T* out, const int64_t* table, int64_t context,
                   int64_t dynamic_dim, const Shape& shape, std::vector<float>& scratch) {
    const int64_t dim = D ? D : dynamic_dim, group = shape.heads / shape.kv_heads, pitch = shape.kv_heads * dim;
    scratch.assign(group * (2 * dim + context) + dim, 0.0f);
    float* queries = scratch.data();
    float* sums = queries + group * dim;
    float* row = sums + group * dim;
    float* scores = row + dim;
    for (int64_t h = 0; h < group; h++)
        for (int64_t i = 0; i < dim; i++) queries[h * dim + i] = widen(q[h * shape.head_stride + i]);
    for (int64_t p = 0; p < context; p++) {
        const T* key = keys + (table[p / shape.block_size] * shape.block_size + p % shape.block_size) * pitch;
        for (int64_t i = 0; i < dim; i++) row[i] = widen(key[i]);
        for (int64_t h = 0; h < group; h++) {
            const float* query = queries + h * dim;
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < dim; i++) dot += query[i] * row[i];
            scores[h * context + p] = dot * shape.scale;
        }
    }
    for (int64_t h = 0; h < group; h++) {
        float* score = scores + h * context;
        float highest = *std::max_element(score, score + context), total = 0.0f;
#pragma omp simd reduction(+ : total)
        for (int64_t p = 0; p < context; p++) total += score[p] = exponential(score[p] - highest);
        float inverse = 1.0f / total;
        for (int64_t p = 0; p < context; p++) score[p] *= inverse;
    }
    for (int64_t p = 0; p < context; p++) {
        const T* value = values + (table[p / shape.block_size] * shape.block_size + p % shape.block_size) * pitch;
        for (int64_t i = 0; i < dim; i++) row[i] = widen(value[i]);
        for (int64_t h = 0; h < group; h++) {
            float weight = scores[h * context + p];
            float* sum = sums + h * dim;
#pragma omp simd
            for (int64_t i = 0; i < dim; i++) sum[i] += weight * row[i];
        }
    }
    for (int64_t i = 0; i < group * dim; i++) out[i] = narrow<T>(sums[i]);
}

template <typename T>
static void decode(const T* q, const T* keys, const T* values, T* out, const int64_t* tokens, const int64_t* sequences,
                   const int64_t* contexts, const int64_t* tables, int64_t count, int64_t dim, const Shape& shape) {
    int64_t tasks = count * shape.kv_heads, work = 0, group = shape.heads / shape.kv_heads;
    for (int64_t n = 0; n < count; n++) work += contexts[n] * shape.heads * dim;
#pragma omp parallel if (work >= 2 * kParallelElements)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            // Tasks come longest first: contexts descend.
            int64_t n = task / shape.kv_heads, g = task % shape.kv_heads;
            const T* query = q + tokens[n] * shape.token_stride + g * group * shape.head_stride;
            T* to = out + (tokens[n] * shape.heads + g * group) * dim;
            const int64_t* table = tables + sequences[n] * shape.table_stride;
            auto* function = dim == 64 ? attend<T, 64> : dim == 128 ? attend<T, 128> : attend<T, 0>;
            function(query, keys + g * dim, values + g * dim, to, table, contexts[n], dim, shape, scratch);
        }
    }
}

#define EXPORT_DECODE(name, T)                                                                                        \
    extern "C" void name(const void* q, const void* keys, const void* values, void* out, const int64_t* tokens,       \
                         const int64_t* sequences, const int64_t* contexts, const int64_t* tables, int64_t count,     \
                         int64_t dim, int64_t heads, int64_t kv_heads, int64_t block_size, int64_t table_stride,      \
                         int64_t token_stride, int64_t head_stride, float scale) {                                    \
        Shape shape{heads, kv_heads, block_size, table_stride, token_stride, head_stride, scale};                     \
        decode<T>((const T*)q, (const T*)keys, (const T*)values, (T*)out, tokens, sequences, contexts, tables, count, \
                  dim, shape);                                                                                        \
    }
EXPORT_DECODE(decode_float32, float)
EXPORT_DECODE(decode_bfloat16, BFloat16)
EXPORT_DECODE(decode_float16, _Float16)
