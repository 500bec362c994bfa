// cache row slots[t] = rows[t], each of heads * head_bytes bytes; heads dense in themselves. Strides in bytes.
#include "common.h"

// Returns the first token whose slot is outside the cache, with nothing written; -1 where there is none.
extern "C" int64_t write_rows(const char* keys, const char* values, char* key_cache, char* value_cache,
                              const int64_t* slots, int64_t tokens, int64_t num_slots, int64_t heads, int64_t head_bytes,
                              int64_t key_token_stride, int64_t key_head_stride, int64_t value_token_stride,
                              int64_t value_head_stride) {
    for (int64_t token = 0; token < tokens; token++)
        if (slots[token] < 0 || slots[token] >= num_slots) return token;
#pragma omp parallel for if (tokens * heads * head_bytes >= 4 * kParallelElements)
    for (int64_t token = 0; token < tokens; token++) {
        int64_t row = slots[token] * heads * head_bytes;
        for (int64_t head = 0; head < heads; head++) {
            int64_t to = row + head * head_bytes;
            std::memcpy(key_cache + to, keys + token * key_token_stride + head * key_head_stride, head_bytes);
            std::memcpy(value_cache + to, values + token * value_token_stride + head * value_head_stride, head_bytes);
        }
    }
    return -1;
}
