// Attention over the block-table cache, read where it lies. Two kernels: of single tokens, one task a sequence and KV
// head; of many tokens of one sequence, one task a KV head and some of the tokens.
#include <algorithm>
#include <vector>

#include "common.h"

struct Shape {
    int64_t heads, kv_heads, block_size, table_stride, token_stride, head_stride;
    float scale;
};

// Calls body(position, row) for the rows of one KV head's cache, in order.
template <typename T, typename Body>
static inline void each_row(const T* cache, const int64_t* table, int64_t context, int64_t pitch, const Shape& shape,
                            Body body) {
    for (int64_t begin = 0; begin < context; begin += shape.block_size) {
        const T* row = cache + table[begin / shape.block_size] * shape.block_size * pitch;
        int64_t end = std::min(begin + shape.block_size, context);
        for (int64_t p = begin; p < end; p++, row += pitch) body(p, row);
    }
}

// softmax without its division: row[0, visible) becomes e^(scale * (x - highest)), the rest of it 0. Returns the sum.
static float exponentials(float* row, int64_t visible, int64_t end, float scale) {
    float highest = row[0], total = 0.0f;
#pragma omp simd reduction(max : highest)
    for (int64_t p = 0; p < visible; p++) highest = row[p] > highest ? row[p] : highest;
#pragma omp simd reduction(+ : total)
    for (int64_t p = 0; p < visible; p++) total += row[p] = exponential(scale * (row[p] - highest));
    for (int64_t p = visible; p < end; p++) row[p] = 0.0f;
    return total;
}

// G heads of one token, which share a KV head; a head has D numbers, a multiple of 16: all sums stay in registers.
template <typename T, int D, int G>
static void attend(const T* q, const T* keys, const T* values, T* out, const int64_t* table, int64_t context,
                   int64_t, int64_t, const Shape& shape, std::vector<float>& scratch) {
    constexpr int kParts = D / 16;
    const int64_t pitch = shape.kv_heads * D;
    scratch.resize(G * context);
    float* scores = scratch.data();
    Vector held[G][kParts];
    for (int h = 0; h < G; h++)
        for (int i = 0; i < kParts; i++) held[h][i] = widen16(q + h * shape.head_stride + 16 * i);
    each_row(keys, table, context, pitch, shape, [&](int64_t p, const T* row) {
        Vector key[kParts];
        for (int i = 0; i < kParts; i++) key[i] = widen16(row + 16 * i);
        for (int h = 0; h < G; h++) {
            Vector dot = held[h][0] * key[0];
            for (int i = 1; i < kParts; i++) dot += held[h][i] * key[i];
            scores[h * context + p] = sum16(dot);
        }
    });
    float inverse[G];
    for (int h = 0; h < G; h++) inverse[h] = 1.0f / exponentials(scores + h * context, context, context, shape.scale);
    for (int h = 0; h < G; h++)
        for (int i = 0; i < kParts; i++) held[h][i] = Vector{};
    each_row(values, table, context, pitch, shape, [&](int64_t p, const T* row) {
        Vector value[kParts];
        for (int i = 0; i < kParts; i++) value[i] = widen16(row + 16 * i);
        for (int h = 0; h < G; h++)
            for (int i = 0; i < kParts; i++) held[h][i] += scores[h * context + p] * value[i];
    });
    for (int h = 0; h < G; h++)
        for (int i = 0; i < D; i++) out[h * D + i] = narrow<T>(held[h][i / 16][i % 16] * inverse[h]);
}

// The same for heads of any size and number.
template <typename T>
static void attend_any(const T* q, const T* keys, const T* values, T* out, const int64_t* table, int64_t context,
                       int64_t dim, int64_t group, const Shape& shape, std::vector<float>& scratch) {
    const int64_t pitch = shape.kv_heads * dim;
    scratch.assign(group * (dim + context), 0.0f);
    float* sums = scratch.data();
    float* scores = sums + group * dim;
    each_row(keys, table, context, pitch, shape, [&](int64_t p, const T* row) {
        for (int64_t h = 0; h < group; h++) {
            const T* query = q + h * shape.head_stride;
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < dim; i++) dot += widen(query[i]) * widen(row[i]);
            scores[h * context + p] = dot;
        }
    });
    for (int64_t h = 0; h < group; h++) {
        float inverse = 1.0f / exponentials(scores + h * context, context, context, shape.scale);
        for (int64_t p = 0; p < context; p++) scores[h * context + p] *= inverse;
    }
    each_row(values, table, context, pitch, shape, [&](int64_t p, const T* row) {
        for (int64_t h = 0; h < group; h++) {
            float weight = scores[h * context + p];
#pragma omp simd
            for (int64_t i = 0; i < dim; i++) sums[h * dim + i] += weight * widen(row[i]);
        }
    });
    for (int64_t i = 0; i < group * dim; i++) out[i] = narrow<T>(sums[i]);
}

template <typename T>
using Attend = void (*)(const T*, const T*, const T*, T*, const int64_t*, int64_t, int64_t, int64_t, const Shape&,
                        std::vector<float>&);

// The function for `heads` heads at once, as many as have their sums in registers.
template <typename T>
static Attend<T> choose(int64_t dim, int64_t heads) {
    if (dim == 64) {
        Attend<T> by_heads[] = {attend<T, 64, 1>, attend<T, 64, 2>, attend<T, 64, 3>, attend<T, 64, 4>};
        return by_heads[heads - 1];
    }
    if (dim == 128 && heads <= 2) return heads == 1 ? attend<T, 128, 1> : attend<T, 128, 2>;
    return attend_any<T>;
}

template <typename T>
static void decode(const T* q, const T* keys, const T* values, T* out, const int64_t* tokens, const int64_t* sequences,
                   const int64_t* contexts, const int64_t* tables, int64_t count, int64_t dim, const Shape& shape) {
    int64_t tasks = count * shape.kv_heads, work = 0, group = shape.heads / shape.kv_heads;
    int64_t at_once = std::min<int64_t>(group, dim == 128 ? 2 : 4);
    for (int64_t n = 0; n < count; n++) work += contexts[n] * shape.heads * dim;
#pragma omp parallel if (work >= 4 * kParallelElements)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++) {
            // Tasks come longest first: contexts descend.
            int64_t n = task / shape.kv_heads, g = task % shape.kv_heads;
            const int64_t* table = tables + sequences[n] * shape.table_stride;
            for (int64_t h = 0; h < group; h += at_once) {
                int64_t head = g * group + h, heads = std::min(at_once, group - h);
                const T* query = q + tokens[n] * shape.token_stride + head * shape.head_stride;
                T* to = out + (tokens[n] * shape.heads + head) * dim;
                choose<T>(dim, heads)(query, keys + g * dim, values + g * dim, to, table, contexts[n], dim, heads, shape,
                                      scratch);
            }
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

// ---- many tokens of one sequence

constexpr int64_t kColumns = 32;  // of a tile of the products below
#ifdef __AVX512F__
constexpr int kRows = 8;
#else
constexpr int kRows = 2;
#endif
constexpr int64_t kTokensPerTask = 64;

// c[kRows][columns] = a[kRows][depth] * b[depth][columns], dense rows of the given lengths; columns in kColumns.
static void multiply(const float* a, const float* b, float* c, int64_t depth, int64_t columns, int64_t a_row,
                     int64_t b_row, int64_t c_row) {
    for (int64_t j = 0; j < columns; j += kColumns) {
        Vector low[kRows] = {}, high[kRows] = {};
        for (int64_t k = 0; k < depth; k++) {
            const float* from = b + k * b_row + j;
            Vector b_low = *(const Vector*)from, b_high = *(const Vector*)(from + 16);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; i++) {
                low[i] += a[i * a_row + k] * b_low;
                high[i] += a[i * a_row + k] * b_high;
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) {
            *(Vector*)(c + i * c_row + j) = low[i];
            *(Vector*)(c + i * c_row + j + 16) = high[i];
        }
    }
}

static int64_t padded(int64_t size) { return (size + kColumns - 1) / kColumns * kColumns; }

// A sequence's keys, turned over, and values of one KV head, in float32: [dim, context] and [context, dim], padded.
template <typename T>
static void gather(const T* keys, const T* values, const int64_t* table, int64_t context, int64_t dim,
                   const Shape& shape, float* turned, float* dense) {
    const int64_t pitch = shape.kv_heads * dim, columns = padded(context), width = padded(dim);
    each_row(keys, table, context, pitch, shape, [&](int64_t p, const T* row) {
        for (int64_t i = 0; i < dim; i++) turned[i * columns + p] = widen(row[i]);
    });
    each_row(values, table, context, pitch, shape, [&](int64_t p, const T* row) {
        for (int64_t i = 0; i < dim; i++) dense[p * width + i] = widen(row[i]);
    });
}

// Rows are (token, head of the group) pairs; a row sees the context up to its token, or all of it.
template <typename T>
static void prefill(const T* q, const T* keys, const T* values, T* out, const int64_t* table, int64_t tokens,
                    int64_t context, int64_t causal, int64_t dim, const Shape& shape) {
    const int64_t group = shape.heads / shape.kv_heads, columns = padded(context), width = padded(dim);
    const int64_t chunks = (tokens + kTokensPerTask - 1) / kTokensPerTask;
#pragma omp parallel if (tokens * context * shape.heads * dim >= 16 * kParallelElements)
    {
        std::vector<float> turned(dim * columns), dense(columns * width);
        std::vector<float> queries(kRows * dim), scores(kRows * columns), sums(kRows * width);
        int64_t gathered = -1;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < chunks * shape.kv_heads; task++) {
            // A thread keeps what it gathered of a head; the last tokens, which see most, come first.
            int64_t g = task / chunks, chunk = chunks - 1 - task % chunks;
            if (g != gathered)
                gather(keys + g * dim, values + g * dim, table, context, dim, shape, turned.data(), dense.data());
            gathered = g;
            int64_t end = std::min(tokens, (chunk + 1) * kTokensPerTask) * group;
            for (int64_t first = chunk * kTokensPerTask * group; first < end; first += kRows) {
                int64_t rows = std::min<int64_t>(kRows, end - first);
                auto visible = [&](int64_t row) { return causal ? context - tokens + row / group + 1 : context; };
                int64_t seen = padded(visible(first + rows - 1));
                std::fill(queries.begin(), queries.end(), 0.0f);
                for (int64_t r = 0; r < rows; r++) {
                    int64_t token = (first + r) / group, head = g * group + (first + r) % group;
                    const T* from = q + token * shape.token_stride + head * shape.head_stride;
                    for (int64_t i = 0; i < dim; i++) queries[r * dim + i] = widen(from[i]);
                }
                multiply(queries.data(), turned.data(), scores.data(), dim, seen, dim, columns, columns);
                float inverse[kRows];
                for (int64_t r = 0; r < rows; r++)
                    inverse[r] = 1.0f / exponentials(&scores[r * columns], visible(first + r), seen, shape.scale);
                multiply(scores.data(), dense.data(), sums.data(), seen, width, columns, width, width);
                for (int64_t r = 0; r < rows; r++) {
                    int64_t token = (first + r) / group, head = g * group + (first + r) % group;
                    T* to = out + (token * shape.heads + head) * dim;
                    for (int64_t i = 0; i < dim; i++) to[i] = narrow<T>(sums[r * width + i] * inverse[r]);
                }
            }
        }
    }
}

#define EXPORT_PREFILL(name, T)                                                                                     \
    extern "C" void name(const void* q, const void* keys, const void* values, void* out, const int64_t* table,      \
                         int64_t tokens, int64_t context, int64_t causal, int64_t dim, int64_t heads,               \
                         int64_t kv_heads, int64_t block_size, int64_t token_stride, int64_t head_stride,           \
                         float scale) {                                                                             \
        Shape shape{heads, kv_heads, block_size, 0, token_stride, head_stride, scale};                              \
        prefill<T>((const T*)q, (const T*)keys, (const T*)values, (T*)out, table, tokens, context, causal, dim,     \
                   shape);                                                                                          \
    }
EXPORT_PREFILL(prefill_float32, float)
EXPORT_PREFILL(prefill_bfloat16, BFloat16)
EXPORT_PREFILL(prefill_float16, _Float16)
