/* The elementwise parts of a step, each in one pass over memory.

   What torch does in five or six operations, each of which reads and writes a whole matrix, is done here a row at a
   time, so that a row stays in the first cache. Plain C that a compiler turns into vector instructions (no intrinsics):
   the same file serves x86-64 and aarch64. Matrices are contiguous and row-major. Every function takes the number of
   threads last and writes only what its comment says. Results do not depend on the number of threads.  */

#include "exponential.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define ROWS(threads) _Pragma("omp parallel for num_threads(threads) schedule(static)")
static const float SMALLEST = 0x1p-100f;
static const float LOW_STEPS = 254.0f;
/* 2^32 divided by the golden ratio and by the plastic number: multiples of them fill [0, 2^32) evenly. */
static const uint32_t GOLDEN = 2654435769u, PLASTIC = 3242174889u;

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Magnitudes are compared as integers: the order is the same, and NaN is the largest, so that it is never lost. */
static inline uint32_t magnitude(float value) { return bits_of(value) & 0x7fffffffu; }

static inline float step_of(uint32_t largest) {
    float step = of_bits(largest) / 127.0f;
    return step < SMALLEST ? SMALLEST : step; /* false for NaN, which stays */
}

/* A float that is no number has no integer: it is kept out of the conversion, and the scale says it. */
static inline int8_t limited(float whole) {
    whole = whole > 127.0f ? 127.0f : whole;
    whole = whole > -127.0f ? whole : -127.0f;
    return (int8_t)(int32_t)whole;
}

static inline int8_t to_int8(float value) { return limited(rintf(value)); }

/* Where a value between two steps starts, in [0, 1): a fixed pattern that is even along each row and each column. */
static inline float turn_of(int64_t row, int64_t column) {
    uint32_t at = (uint32_t)row * GOLDEN + (uint32_t)column * PLASTIC;
    return (float)(int32_t)(at >> 8) * 0x1p-24f;
}

/* q [n, k], scale [n] of x [n, k], or of x * columns with columns [k]. evenly: see quantize_columns. */
API void quantize_rows(const float *x, const float *columns, int64_t n, int64_t k, int evenly, int8_t *q, float *scale,
                       int threads) {
    ROWS(threads)
    for (int64_t row = 0; row < n; row++) {
        const float *in = x + row * k;
        int8_t *out = q + row * k;
        uint32_t largest = 0;
        if (columns) {
            for (int64_t i = 0; i < k; i++) {
                uint32_t size = magnitude(in[i] * columns[i]);
                largest = size > largest ? size : largest;
            }
        } else {
            for (int64_t i = 0; i < k; i++) {
                uint32_t size = magnitude(in[i]);
                largest = size > largest ? size : largest;
            }
        }
        float step = step_of(largest), inverse = 1.0f / step;
        scale[row] = step;
        if (evenly && columns) {
            for (int64_t i = 0; i < k; i++) out[i] = limited(floorf(in[i] * columns[i] * inverse + turn_of(row, i)));
        } else if (evenly) {
            for (int64_t i = 0; i < k; i++) out[i] = limited(floorf(in[i] * inverse + turn_of(row, i)));
        } else if (columns) {
            for (int64_t i = 0; i < k; i++) out[i] = to_int8(in[i] * columns[i] * inverse);
        } else {
            for (int64_t i = 0; i < k; i++) out[i] = to_int8(in[i] * inverse);
        }
    }
}

/* q [n, k], scale [k] of x[i, :] * tokens[i], one scale per column: the operand of a sum over rows. A value between
   two steps goes up as often as its share says, by a fixed pattern that is even along each column, so that what is much
   smaller than the largest of its column is not lost from the sum. */
API void quantize_columns(const float *x, const float *tokens, int64_t n, int64_t k, int8_t *q, float *scale,
                          int threads) {
    enum { STRIP = 256 };
    ROWS(threads)
    for (int64_t start = 0; start < k; start += STRIP) {
        int64_t width = k - start < STRIP ? k - start : STRIP;
        uint32_t largest[STRIP] = {0};
        float inverse[STRIP];
        for (int64_t row = 0; row < n; row++) {
            const float *in = x + row * k + start, token = tokens[row];
            for (int64_t i = 0; i < width; i++) {
                uint32_t size = magnitude(in[i] * token);
                largest[i] = size > largest[i] ? size : largest[i];
            }
        }
        for (int64_t i = 0; i < width; i++) {
            float step = step_of(largest[i]);
            scale[start + i] = step;
            inverse[i] = 1.0f / step;
        }
        for (int64_t row = 0; row < n; row++) {
            const float *in = x + row * k + start, token = tokens[row];
            int8_t *out = q + row * k + start;
            for (int64_t i = 0; i < width; i++)
                out[i] = limited(floorf(in[i] * token * inverse[i] + turn_of(row, start + i)));
        }
    }
}

/* y [n, m] = rows[:, None] * (high + low / 254) * columns + bias; low, columns, bias may be absent, but not columns
   where low is; y may be high. */
API void scale_product(const int32_t *high, const int32_t *low, const float *rows, const float *columns,
                       const float *bias, int64_t n, int64_t m, float *y, int threads) {
    ROWS(threads)
    for (int64_t row = 0; row < n; row++) {
        const int32_t *in = high + row * m, *more = low + row * m;
        float *out = y + row * m, scale = rows[row];
        if (low && columns) {
            for (int64_t i = 0; i < m; i++)
                out[i] = ((float)in[i] + (float)more[i] * (1.0f / LOW_STEPS)) * scale * columns[i];
        } else if (columns) {
            for (int64_t i = 0; i < m; i++) out[i] = (float)in[i] * scale * columns[i];
        } else {
            for (int64_t i = 0; i < m; i++) out[i] = (float)in[i] * scale;
        }
        if (bias)
            for (int64_t i = 0; i < m; i++) out[i] += bias[i];
    }
}

/* One element of a float32 array or, with `half`, of a bfloat16 one: the upper half of a float32. */
static inline float element(const void *from, int half, int64_t i) {
    return half ? of_bits((uint32_t)((const uint16_t *)from)[i] << 16) : ((const float *)from)[i];
}

static inline __attribute__((always_inline)) int64_t split_rows(const void *w, int half, int64_t n, int64_t k,
                                                                int8_t *q, int8_t *low, uint16_t *scale, int threads) {
    int64_t broken = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : broken)
    for (int64_t row = 0; row < n; row++) {
        const void *in = (const char *)w + row * k * (half ? 2 : 4);
        int8_t *high = q + row * k, *rest = low + row * k;
        uint32_t largest = 0;
        for (int64_t i = 0; i < k; i++) {
            uint32_t size = magnitude(element(in, half, i));
            largest = size > largest ? size : largest;
        }
        uint32_t bits = bits_of(step_of(largest));
        int finite = (bits & 0x7f800000u) != 0x7f800000u;
        uint32_t up = finite ? (bits + 0xffffu) >> 16 : bits >> 16;
        finite = finite && (up & 0x7f80u) != 0x7f80u;
        broken += !finite;
        scale[row] = (uint16_t)(finite ? up : 0x7fc0u);
        float step = of_bits(up << 16);
        for (int64_t i = 0; i < k; i++) {
            float ratio = element(in, half, i) / step, whole = rintf(ratio);
            high[i] = to_int8(whole);
            rest[i] = to_int8((ratio - whole) * LOW_STEPS);
        }
    }
    return broken;
}

/* The planes q, low [n, k] and bfloat16 scales [n], rounded up, of the master w [n, k], float32 or, with `half`,
   bfloat16; returns how many scales are not finite. */
API int64_t split_planes(const void *w, int half, int64_t n, int64_t k, int8_t *q, int8_t *low, uint16_t *scale,
                         int threads) {
    return half ? split_rows(w, 1, n, k, q, low, scale, threads) : split_rows(w, 0, n, k, q, low, scale, threads);
}

/* y [n, k] = x * rstd * (weight + offset), rstd [n] = 1 / sqrt(mean(x^2) + eps). */
API void rms_norm(const float *x, const float *weight, float offset, float eps, int64_t n, int64_t k, float *y,
                  float *rstd, int threads) {
    ROWS(threads)
    for (int64_t row = 0; row < n; row++) {
        const float *in = x + row * k;
        float *out = y + row * k, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < k; i++) sum += in[i] * in[i];
        float r = 1.0f / sqrtf(sum / (float)k + eps);
        rstd[row] = r;
        for (int64_t i = 0; i < k; i++) out[i] = in[i] * r * (weight[i] + offset);
    }
}

/* dx [n, k] of rms_norm from dy [n, k]. */
API void rms_norm_back(const float *dy, const float *x, const float *weight, float offset, const float *rstd,
                       int64_t n, int64_t k, float *dx, int threads) {
    ROWS(threads)
    for (int64_t row = 0; row < n; row++) {
        const float *in = x + row * k, *up = dy + row * k;
        float *out = dx + row * k, r = rstd[row], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < k; i++) sum += up[i] * (weight[i] + offset) * in[i];
        float share = sum * r * r / (float)k;
        for (int64_t i = 0; i < k; i++) out[i] = r * (up[i] * (weight[i] + offset) - share * in[i]);
    }
}

static inline float sigmoid(float x) {
    float faint = exp_of(-fabsf(x)), large = 1.0f / (1.0f + faint);
    float share = x >= 0.0f ? 1.0f : faint; /* not 1 - large, which has no digits left far below 0 */
    share = x > -87.0f ? share : 0.0f;
    return share * large;
}

/* y [n] = silu(gate) * up. */
API void silu_mul(const float *gate, const float *up, int64_t n, float *y, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

/* The gradients to gate and up [n] from dy [n]. */
API void silu_mul_back(const float *dy, const float *gate, const float *up, int64_t n, float *dgate, float *dup,
                       int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float s = sigmoid(gate[i]), silu = gate[i] * s;
        dup[i] = dy[i] * silu;
        dgate[i] = dy[i] * up[i] * (s + silu * (1.0f - s));
    }
}

/* y [rows, heads, d] = x * cos + rotate_half(x) * sin, or with back its transpose; cos, sin [rows or 1 per row, d].
   stride: elements from one row of cos to the next. x may have row and head strides of its own; y is contiguous. */
API void rotate(const float *x, int64_t row_stride, int64_t head_stride, const float *cosine, const float *sine,
                int64_t angles, int64_t rows, int64_t heads, int64_t d, int back, float *y, int threads) {
    int64_t half = d / 2;
    ROWS(threads)
    for (int64_t row = 0; row < rows; row++) {
        const float *c = cosine + (row % angles) * d, *s = sine + (row % angles) * d;
        for (int64_t head = 0; head < heads; head++) {
            const float *in = x + row * row_stride + head * head_stride;
            float *out = y + (row * heads + head) * d;
            if (back) {
#pragma omp simd
                for (int64_t i = 0; i < half; i++) {
                    out[i] = in[i] * c[i] + in[half + i] * s[half + i];
                    out[half + i] = in[half + i] * c[half + i] - in[i] * s[i];
                }
            } else {
#pragma omp simd
                for (int64_t i = 0; i < half; i++) {
                    out[i] = in[i] * c[i] - in[half + i] * s[i];
                    out[half + i] = in[half + i] * c[half + i] + in[i] * s[half + i];
                }
            }
        }
    }
}

/* Magnitudes in [0, 1] as 7 bits (8 steps per power of two) or 8 bits (16 steps), down to 2^-15.9. A value between two
   steps goes up as often as its share says, so that what is added to it is not lost: 1 - beta2 is far below a step. */
enum { BLOCK = 256 };

static inline uint32_t mixed(uint32_t i, uint32_t key) {
    uint32_t h = (i ^ key) * 0x9e3779b1u;
    h = (h ^ (h >> 15)) * 0x85ebca77u;
    h = (h ^ (h >> 13)) * 0xc2b2ae3du;
    return h ^ (h >> 16);
}

static inline int32_t coded(float value, int shift, int32_t top, uint32_t chance) {
    int32_t low = (int32_t)(chance & ((1u << shift) - 1u));
    int32_t code = ((int32_t)bits_of(value) + low) >> shift;
    code += top - (127 << (23 - shift));
    return code < top ? code : top;
}

static inline float decoded(int32_t code, int shift, int32_t top) {
    return of_bits((uint32_t)(code - top + (127 << (23 - shift))) << shift);
}

static inline __attribute__((always_inline)) void adamw_blocks(void *w, int half, const float *g, uint8_t *first,
                                                               uint8_t *second, float *largest1, float *largest2,
                                                               int64_t n, float lr, float beta1, float beta2, float eps,
                                                               float decay, int64_t key, int threads) {
    ROWS(threads)
    for (int64_t block = 0; block < (n + BLOCK - 1) / BLOCK; block++) {
        int64_t start = block * BLOCK, size = n - start < BLOCK ? n - start : BLOCK;
        float m[BLOCK], r[BLOCK], old1 = largest1[block], old2 = largest2[block];
        for (int64_t i = 0; i < size; i++) {
            int32_t a = first[start + i], b = second[start + i];
            float mean = (a & 127) ? decoded(a & 127, 20, 127) * old1 : 0.0f;
            float root = b ? decoded(b, 19, 255) * old2 : 0.0f, slope = g[start + i];
            mean = a & 128 ? -mean : mean;
            mean = beta1 * mean + (1.0f - beta1) * slope;
            root = sqrtf(beta2 * root * root + (1.0f - beta2) * slope * slope);
            float before = element(w, half, start + i);
            float after = before - (decay * before + lr * mean / (root + eps));
            if (half) /* cut off after 16 random bits below were added: up as often as its share says */
                ((uint16_t *)w)[start + i] =
                    (uint16_t)((bits_of(after) + (mixed((uint32_t)(start + i), (uint32_t)key ^ PLASTIC) >> 16)) >> 16);
            else
                ((float *)w)[start + i] = after;
            m[i] = mean;
            r[i] = root;
        }
        uint32_t most1 = 0, most2 = 0;
        for (int64_t i = 0; i < size; i++) {
            uint32_t mean = magnitude(m[i]), root = magnitude(r[i]);
            most1 = mean > most1 ? mean : most1;
            most2 = root > most2 ? root : most2;
        }
        float top1 = of_bits(most1), top2 = of_bits(most2);
        largest1[block] = top1;
        largest2[block] = top2;
        float inverse1 = top1 > 0.0f ? 1.0f / top1 : 0.0f, inverse2 = top2 > 0.0f ? 1.0f / top2 : 0.0f;
        for (int64_t i = 0; i < size; i++) {
            uint32_t chance = mixed((uint32_t)(start + i), (uint32_t)key);
            int32_t a = coded(fabsf(m[i]) * inverse1, 20, 127, chance), b = coded(r[i] * inverse2, 19, 255, chance >> 8);
            a = a > 0 ? a : 0;
            b = b > 1 ? b : (r[i] > 0.0f);
            first[start + i] = (uint8_t)(a | (m[i] < 0.0f ? 128 : 0));
            second[start + i] = (uint8_t)b;
        }
    }
}

/* One step of AdamW on w [n], float32 or, with `half`, bfloat16 rounded at random, from g [n], in place. first [n]: sign
   and 7 bits of the mean gradient; second [n]: 8 bits of the root of the mean square, never 0 once it was not; one
   largest magnitude per BLOCK of each. lr: with the corrections of both means; eps: with that of the second. */
API void adamw_8bit(void *w, int half, const float *g, uint8_t *first, uint8_t *second, float *largest1,
                    float *largest2, int64_t n, float lr, float beta1, float beta2, float eps, float decay,
                    int64_t key, int threads) {
    if (half)
        adamw_blocks(w, 1, g, first, second, largest1, largest2, n, lr, beta1, beta2, eps, decay, key, threads);
    else
        adamw_blocks(w, 0, g, first, second, largest1, largest2, n, lr, beta1, beta2, eps, decay, key, threads);
}
