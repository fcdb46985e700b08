/* Vectors of 16 bytes and the shuffles that turn small squares of a matrix, on every processor GCC and Clang know. */

#pragma once

#include <stdint.h>
#include <string.h>

typedef uint8_t bytes_t __attribute__((vector_size(16)));
typedef uint16_t pairs_t __attribute__((vector_size(16)));
typedef uint32_t words_t __attribute__((vector_size(16)));
typedef uint64_t longs_t __attribute__((vector_size(16)));

/* Shuffles of two vectors: GCC before 12 knows one name, Clang the other. */
#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#define MIX(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNROLLED _Pragma("GCC unroll 16")
#define MIX(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif
#define LOW_BYTES(a, b) MIX(bytes_t, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH_BYTES(a, b) MIX(bytes_t, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define LOW_PAIRS(a, b) MIX(pairs_t, a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH_PAIRS(a, b) MIX(pairs_t, a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define LOW_WORDS(a, b) MIX(words_t, a, b, 0, 4, 1, 5)
#define HIGH_WORDS(a, b) MIX(words_t, a, b, 2, 6, 3, 7)
#define LOW_LONGS(a, b) MIX(longs_t, a, b, 0, 2)
#define HIGH_LONGS(a, b) MIX(longs_t, a, b, 1, 3)
#define LOW_LONGS_OF(a, b) LOW_LONGS((longs_t)(a), (longs_t)(b))
#define HIGH_LONGS_OF(a, b) HIGH_LONGS((longs_t)(a), (longs_t)(b))

/* Four words of each of four rows become four rows of the same word: from[i][j] to to[j * pitch][i]. */
static inline void turn_words(const words_t from[4], void *to, int64_t pitch) {
    words_t low[2] = {LOW_WORDS(from[0], from[1]), LOW_WORDS(from[2], from[3])};
    words_t high[2] = {HIGH_WORDS(from[0], from[1]), HIGH_WORDS(from[2], from[3])};
    longs_t turned[4] = {LOW_LONGS_OF(low[0], low[1]), HIGH_LONGS_OF(low[0], low[1]),
                         LOW_LONGS_OF(high[0], high[1]), HIGH_LONGS_OF(high[0], high[1])};
    for (int64_t row = 0; row < 4; row++) memcpy((uint8_t *)to + row * pitch, &turned[row], 16);
}
