/* Strips and panels: blocks of two int8 matrices as `products.c` multiplies them, and the dot products of the processor
   that decide how they look. Nothing but the names of types is here where none is known (DOT is not defined then). */

#pragma once

#include "shuffles.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define ROWS 12
enum { LANES = 16, OFFSET = 128 };
typedef int32_t sums_t __attribute__((vector_size(64)));
#define DOT(sum, unsigned_b, a) (sums_t) _mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(unsigned_b), (__m512i)(a))
#elif defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#include <immintrin.h>
#define ROWS 6
enum { LANES = 8, OFFSET = 128 };
typedef int32_t sums_t __attribute__((vector_size(32)));
#ifdef __AVXVNNI__
#define DOT(sum, unsigned_b, a) (sums_t) _mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(unsigned_b), (__m256i)(a))
#else
#define DOT(sum, unsigned_b, a) (sums_t) _mm256_dpbusd_epi32((__m256i)(sum), (__m256i)(unsigned_b), (__m256i)(a))
#endif
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#define ROWS 12
enum { LANES = 4, OFFSET = 0 };
typedef int32_t sums_t __attribute__((vector_size(16)));
#define DOT(sum, b, a) (sums_t) vdotq_s32((int32x4_t)(sum), (int8x16_t)(b), (int8x16_t)(a))
#elif defined(__AVX2__)
#include <immintrin.h>
#define ROWS 6
#define WIDENED
enum { LANES = 8, OFFSET = 0 };
typedef int32_t sums_t __attribute__((vector_size(32)));
#define DOT(sum, b, a) ((sum) + (sums_t)_mm256_madd_epi16((__m256i)(b), (__m256i)(a)))
#endif

#ifdef WIDENED
typedef int16_t value_t;
#else
typedef int8_t value_t;
#endif

#ifdef DOT

/* Values of k in a word; columns of a tile; values of k at once, and with both planes in one number; steps of the lower
   plane in one of the upper; bytes from one row of a strip to the next, from one word of k to the next of a turned one,
   and of a strip. */
enum {
    VALUES = 4 / sizeof(value_t),
    PANEL = 2 * LANES,
    DEEP = 384 * VALUES,
    JOINT = sizeof(value_t) == 2,
    JOINT_DEEP = 512,
    STEPS = 254,
    STRIDE = DEEP * sizeof(value_t) + 64,
    TURNED = (ROWS * 4 + 15) / 16 * 16,
    STRIP = ROWS * STRIDE > DEEP / VALUES * TURNED ? ROWS * STRIDE : DEEP / VALUES * TURNED + 64
};

static inline int64_t words(int64_t k) { return (k + VALUES - 1) / VALUES; }

static inline void store(void *to, bytes_t value) { memcpy(to, &value, 16); }

#ifdef WIDENED
/* Four words of one row. offset: turns signed values to unsigned ones where the processor wants them. */
static inline words_t load(const int8_t *from, uint8_t offset) {
    (void)offset;
    return (words_t)_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)from));
}

/* Of 16 columns of VALUES rows, the word of each column; the first 4 * vectors columns are written. */
static inline void interleave(const int8_t *from, int64_t stride, uint8_t offset, int vectors, void *to) {
    for (int half = 0; half < 2 && 2 * half < vectors; half++) {
        pairs_t above = (pairs_t)load(from + 8 * half, offset), below = (pairs_t)load(from + stride + 8 * half, offset);
        store((uint8_t *)to + 32 * half, (bytes_t)LOW_PAIRS(above, below));
        if (vectors > 2 * half + 1) store((uint8_t *)to + 32 * half + 16, (bytes_t)HIGH_PAIRS(above, below));
    }
}
#else
static inline words_t load(const int8_t *from, uint8_t offset) {
    bytes_t value;
    memcpy(&value, from, 16);
    return (words_t)(value ^ offset);
}

static inline void interleave(const int8_t *from, int64_t stride, uint8_t offset, int vectors, void *to) {
    bytes_t b0 = (bytes_t)load(from, offset), b1 = (bytes_t)load(from + stride, offset);
    bytes_t b2 = (bytes_t)load(from + 2 * stride, offset), b3 = (bytes_t)load(from + 3 * stride, offset);
    pairs_t l0 = (pairs_t)LOW_BYTES(b0, b1), l1 = (pairs_t)LOW_BYTES(b2, b3);
    pairs_t h0 = (pairs_t)HIGH_BYTES(b0, b1), h1 = (pairs_t)HIGH_BYTES(b2, b3);
    store(to, (bytes_t)LOW_PAIRS(l0, l1));
    store((uint8_t *)to + 16, (bytes_t)HIGH_PAIRS(l0, l1));
    if (vectors > 2) store((uint8_t *)to + 32, (bytes_t)LOW_PAIRS(h0, h1));
    if (vectors > 3) store((uint8_t *)to + 48, (bytes_t)HIGH_PAIRS(h0, h1));
}
#endif

/* One value of b, packed, and four words of them. low: of the other plane, where both become one number. */
#ifdef WIDENED
static inline value_t packed_value(const int8_t *b, const int8_t *low) {
    return (value_t)(low ? *b * STEPS + *low : *b);
}

static inline words_t packed_words(const int8_t *b, const int8_t *low) {
    words_t high = load(b, OFFSET);
    return low ? (words_t)((pairs_t)high * STEPS + (pairs_t)load(low, OFFSET)) : high;
}
#else
static inline value_t packed_value(const int8_t *b, const int8_t *low) {
    (void)low;
    return (value_t)((uint8_t)*b ^ OFFSET);
}

static inline words_t packed_words(const int8_t *b, const int8_t *low) {
    (void)low;
    return load(b, OFFSET);
}
#endif

/* One panel of b: packed [words(k)][PANEL][VALUES], from rows b[j][0..k) or, turned, from columns b[0..k)[j]. What lies
   beyond its `width` columns and its k values is 0. */
static void pack_rows(const int8_t *b, const int8_t *low, int64_t stride, int64_t width, int64_t k, value_t *packed) {
    for (int64_t column = 0; column < PANEL; column += 4) {
        int64_t at = 0;
        value_t *to = packed + column * VALUES;
        if (column + 4 <= width) {
            const int8_t *from = b + column * stride;
            for (; at + 4 <= k / VALUES; at += 4) {
                for (int64_t i = 4; i < 8; i++) __builtin_prefetch(from + i * stride + VALUES * at);
                words_t rows[4];
                for (int64_t i = 0; i < 4; i++) {
                    const int8_t *row = from + i * stride + VALUES * at;
                    rows[i] = packed_words(row, low ? low + (row - b) : 0);
                }
                turn_words(rows, to + at * PANEL * VALUES, PANEL * 4);
            }
        }
        for (; at < words(k); at++)
            for (int64_t j = 0; j < 4; j++)
                for (int64_t i = 0; i < VALUES; i++) {
                    int64_t from = (column + j) * stride + VALUES * at + i;
                    int inside = column + j < width && VALUES * at + i < k;
                    to[at * PANEL * VALUES + VALUES * j + i] =
                        inside ? packed_value(b + from, low ? low + from : 0) : 0;
                }
    }
}

static void pack_columns(const int8_t *b, int64_t stride, int64_t width, int64_t k, value_t *packed) {
    for (int64_t at = 0; at < words(k); at++) {
        const int8_t *from = b + VALUES * at * stride;
        value_t *to = packed + at * PANEL * VALUES;
        int64_t column = 0;
        if (VALUES * at + VALUES <= k)
            for (; column + 16 <= width && column + 16 <= PANEL; column += 16) {
                for (int64_t i = VALUES; i < 2 * VALUES; i++) __builtin_prefetch(from + i * stride + column);
                interleave(from + column, stride, OFFSET, 4, to + column * VALUES);
            }
        for (; column < PANEL; column++)
            for (int64_t i = 0; i < VALUES; i++) {
                int inside = column < width && VALUES * at + i < k;
                to[column * VALUES + i] = inside ? packed_value(from + i * stride + column, 0) : 0;
            }
    }
}

/* `count` values of a row of a as they stand in a strip. */
#ifdef WIDENED
enum { PIECE = 16 };
static inline sums_t piece_of(const int8_t *from, int64_t count) {
    int8_t values[PIECE] = {0};
    memcpy(values, from, (size_t)(count < PIECE ? count : PIECE));
    return (sums_t)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)values));
}
#else
enum { PIECE = sizeof(sums_t) };
static inline sums_t piece_of(const int8_t *from, int64_t count) {
    sums_t piece = {0};
    memcpy(&piece, from, count < PIECE ? (size_t)count : sizeof piece);
    return piece;
}
#endif

/* A strip of a, its rows STRIDE bytes apart and filled up with 0; start: what undoes the offset of b, per row. */
static void copy_rows(const int8_t *a, int64_t stride, int64_t rows, int64_t k, value_t *strip, int32_t *start) {
    for (int64_t row = 0; row < rows; row++) {
        const int8_t *from = a + row * stride;
        uint8_t *to = (uint8_t *)strip + row * STRIDE;
        sums_t sum = {0}, ones = (sums_t){0} + 0x01010101;
        for (int64_t i = 0; i < k; i += PIECE) {
            sums_t part = piece_of(from + i, k - i);
            memcpy(to + i * (int64_t)sizeof(value_t), &part, sizeof part);
            if (OFFSET) sum = DOT(sum, ones, part);
        }
        start[row] = 0;
        for (int i = 0; i < LANES; i++) start[row] -= OFFSET * sum[i];
    }
}

/* A strip of turned a [k][stride], a word of each row side by side and TURNED bytes apart. left: columns of a from its
   start on, which are all that may be read. */
static void copy_columns(const int8_t *a, int64_t stride, int64_t left, int64_t k, value_t *strip, int32_t *start) {
    int8_t last[VALUES][16] = {{0}};
    uint8_t *to = (uint8_t *)strip;
    for (int64_t at = 0; at < k; at += VALUES, to += TURNED) {
        const int8_t *from = a + at * stride;
        int64_t pitch = stride;
        if (at + VALUES > k || left < 16) {
            for (int64_t i = 0; i < VALUES; i++)
                for (int64_t j = 0; j < 16; j++) last[i][j] = at + i < k && j < left ? from[i * stride + j] : 0;
            from = last[0], pitch = 16;
        } else {
            for (int64_t i = 4 * VALUES; i < 5 * VALUES; i++) __builtin_prefetch(from + i * stride);
        }
        interleave(from, pitch, 0, TURNED / 16, to);
    }
    sums_t part, sum[2] = {{0}, {0}}, ones = (sums_t){0} + 0x01010101;
    for (int64_t at = 0; OFFSET && at < words(k); at++) { /* one vector has a row in each of its first lanes */
        memcpy(&part, (uint8_t *)strip + at * TURNED, sizeof part);
        sum[at % 2] = DOT(sum[at % 2], ones, part);
    }
    for (int64_t row = 0; row < ROWS; row++) start[row] = OFFSET ? -OFFSET * (sum[0][row] + sum[1][row]) : 0;
}
#endif
