/* Causal attention in float32, forward and backward, that computes only what the mask lets through.

   Query i of a row sees the keys from max(start of the row, i - window + 1) to i: what padding on the left and a
   sliding window leave of the triangle. Heads may share keys and values. The scores of a strip of queries are computed for a
   panel of keys at a time and exist for one block of queries and one head alone; forward keeps the logarithm of each
   query's sum, from which backward makes them again. q, k, v have strides of their own (row, head, token; a head's
   elements are adjacent), everything else is contiguous. A query that sees nothing gives 0.  */

#include "exponential.h"
#include "room.h"
#include "shuffles.h"

#define API __attribute__((visibility("default")))

#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16, STRIP = 12, KEYS = 8 };
typedef float floats_t __attribute__((vector_size(64)));
#define ADD_PRODUCT(sum, a, b) (floats_t) _mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(sum))
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
enum { LANES = 8, STRIP = 4, KEYS = 4 };
typedef float floats_t __attribute__((vector_size(32)));
#define ADD_PRODUCT(sum, a, b) (floats_t) _mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(sum))
#else
typedef float floats_t __attribute__((vector_size(16)));
#ifdef __ARM_NEON
#include <arm_neon.h>
enum { LANES = 4, STRIP = 12, KEYS = 4 };
#define ADD_PRODUCT(sum, a, b) (floats_t) vfmaq_f32((float32x4_t)(sum), (float32x4_t)(a), (float32x4_t)(b))
#else
enum { LANES = 4, STRIP = 4, KEYS = 4 };
#define ADD_PRODUCT(sum, a, b) ((sum) + (a) * (b))
#endif
#endif

/* Keys of a panel, which is two vectors; queries of a block, which is some strips. Strips are turned in fours. */
enum { PANEL = 2 * LANES, BLOCK = 48 };
_Static_assert(STRIP % 4 == 0 && BLOCK % STRIP == 0 && PANEL % KEYS == 0, "tiles do not fill blocks");

typedef struct {
    const float *q, *k, *v;
    int64_t strides[3][3]; /* of q, k, v: row, head, token */
    const int64_t *starts; /* first key of each row */
    int64_t rows, heads, groups, tokens, size, window; /* groups: heads of k and v; window: 0 for none */
    float scale;
} job_t;

static inline int64_t first_key(const job_t *job, int64_t row, int64_t query) {
    int64_t start = job->starts[row], near = job->window > 0 ? query - job->window + 1 : 0;
    return near > start ? near : start;
}

/* c [count][PANEL] (+)= sum over n of a[i * down + n * along] * b[n * pitch + 0..PANEL). */
static inline __attribute__((always_inline)) void tile_of(int count, const float *a, int64_t down, int64_t along,
                                                          const float *b, int64_t pitch, int64_t n, float *c,
                                                          int64_t step, int more) {
    floats_t sum[STRIP][2];
    for (int i = 0; i < count; i++)
        for (int half = 0; half < 2; half++) {
            sum[i][half] = (floats_t){0};
            if (more) memcpy(&sum[i][half], c + i * step + half * LANES, sizeof(floats_t));
        }
    for (int64_t at = 0; at < n; at++) {
        floats_t left, right;
        memcpy(&left, b + at * pitch, sizeof left);
        memcpy(&right, b + at * pitch + LANES, sizeof right);
        UNROLLED for (int i = 0; i < count; i++) {
            floats_t spread = a[i * down + at * along] - (floats_t){0}; /* each lane: x - 0 is x, x + 0 is not */
            sum[i][0] = ADD_PRODUCT(sum[i][0], spread, left);
            sum[i][1] = ADD_PRODUCT(sum[i][1], spread, right);
        }
    }
    for (int i = 0; i < count; i++) memcpy(c + i * step, sum[i], 2 * sizeof(floats_t));
}

/* Scores: a strip of queries, turned [size][STRIP], times a panel of turned keys [size][PANEL]. */
static void score_tile(const float *queries, const float *keys, int64_t size, float *c) {
    tile_of(STRIP, queries, 1, STRIP, keys, PANEL, size, c, PANEL, 0);
}

/* Outputs: a strip of shares [STRIP][PANEL] times values [PANEL][pitch], added to c [STRIP][pitch]. */
static void value_tile(const float *shares, const float *values, int64_t pitch, float *c) {
    tile_of(STRIP, shares, PANEL, 1, values, pitch, PANEL, c, pitch, 1);
}

/* Gradients of KEYS keys: shares [count][PANEL], turned, times rows [count][pitch], added to c [KEYS][pitch]. */
static void key_tile(const float *shares, const float *rows, int64_t pitch, int64_t count, float *c) {
    tile_of(KEYS, shares, 1, PANEL, rows, pitch, count, c, pitch, 1);
}

static int64_t filled(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

/* Rows [count][stride], times a factor, as turned groups [all / group][size][group], filled up with 0; `group` and
   `size` are multiples of 4. */
static void turn_rows(const float *from, int64_t stride, int64_t count, int64_t all, int64_t size, int64_t group,
                      float factor, float *to) {
    for (int64_t at = 0; at < all; at += 4) {
        float *square = to + at / group * size * group + at % group;
        for (int64_t d = 0; d < size; d += 4, square += 4 * group) {
            words_t rows[4] = {{0}};
            for (int64_t i = 0; i < 4 && at + i < count; i++) {
                float four[4];
                memcpy(four, from + (at + i) * stride + d, 16);
                for (int j = 0; j < 4; j++) four[j] *= factor;
                memcpy(&rows[i], four, 16);
            }
            turn_words(rows, square, group * (int64_t)sizeof(float));
        }
    }
}

/* Rows [count][stride], times a factor, as [all][pitch], filled up with 0. */
static void copy_rows(const float *from, int64_t stride, int64_t count, int64_t all, int64_t size, int64_t pitch,
                      float factor, float *to) {
    for (int64_t at = 0; at < all; at++, to += pitch) {
        int64_t some = at < count ? size : 0;
        for (int64_t d = 0; d < some; d++) to[d] = from[at * stride + d] * factor;
        memset(to + some, 0, (size_t)(pitch - some) * sizeof(float));
    }
}

/* The panels [first, last) that queries [from, from + count) of a row see some of. */
static void panels_of(const job_t *job, int64_t row, int64_t from, int64_t count, int64_t *first, int64_t *last) {
    *first = first_key(job, row, from) / PANEL;
    *last = (from + count - 1) / PANEL + 1;
}

/* The keys [from, to] of a panel that lie in [low, high], counted from its first. */
static inline void part_of(int64_t panel, int64_t low, int64_t high, int32_t *from, int32_t *to) {
    int64_t first = panel * PANEL;
    *from = low <= first ? 0 : low - first < PANEL ? (int32_t)(low - first) : PANEL;
    *to = high < first ? -1 : high - first < PANEL ? (int32_t)(high - first) : PANEL - 1;
}

/* Shares e^(score - top) of one query in its panels, `pitch` apart, in place, 0 where it sees nothing; their sum. */
static float shares_of(float *scores, int64_t pitch, int64_t first, int64_t last, int64_t low, int64_t high,
                       float top) {
    float sums[PANEL] = {0};
    for (int64_t panel = first; panel < last; panel++, scores += pitch) {
        int32_t from, to;
        part_of(panel, low, high, &from, &to);
#pragma omp simd
        for (int32_t i = 0; i < PANEL; i++) {
            float below = scores[i] - top;
            float share = exp_of(below) + below * 0.0f; /* what is no number stays none */
            share = from <= i && i <= to ? share : 0.0f;
            scores[i] = share;
            sums[i] += share;
        }
    }
    UNROLLED for (int half = PANEL / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

/* The largest score of one query in its panels among the keys it sees. */
static float top_of(const float *scores, int64_t pitch, int64_t first, int64_t last, int64_t low, int64_t high) {
    float tops[PANEL], seen[PANEL];
    for (int i = 0; i < PANEL; i++) tops[i] = -INFINITY;
    for (int64_t panel = first; panel < last; panel++, scores += pitch) {
        int32_t from, to;
        const float *all = scores;
        part_of(panel, low, high, &from, &to);
        if (from > 0 || to < PANEL - 1) {
            for (int32_t i = 0; i < PANEL; i++) seen[i] = -INFINITY;
            for (int32_t i = from; i <= to; i++) seen[i] = scores[i];
            all = seen;
        }
        for (int i = 0; i < PANEL; i++) tops[i] = all[i] > tops[i] ? all[i] : tops[i];
    }
    UNROLLED for (int half = PANEL / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) tops[i] = tops[i] > tops[i + half] ? tops[i] : tops[i + half];
    return tops[0];
}

/* The heads [begin, end) of a group of one row; out and sums as in `attend`. 0 when there is no memory. */
static int attend_heads(const job_t *job, int64_t row, int64_t group, int64_t begin, int64_t end, float *out,
                        float *sums) {
    const int64_t(*s)[3] = job->strides;
    int64_t tokens = job->tokens, size = job->size, all = filled(tokens, PANEL), pitch = filled(size, PANEL);
    float *keys = room(sizeof(float) * (size_t)(all * (size + pitch) + BLOCK * (size + pitch + all)));
    if (!keys) return 0;
    float *values = keys + all * size, *queries = values + all * pitch, *result = queries + BLOCK * size;
    float *scores = result + BLOCK * pitch; /* [panel][BLOCK][PANEL] */
    turn_rows(job->k + row * s[1][0] + group * s[1][1], s[1][2], tokens, all, size, PANEL, 1.0f, keys);
    copy_rows(job->v + row * s[2][0] + group * s[2][1], s[2][2], tokens, all, size, pitch, 1.0f, values);
    for (int64_t head = begin; head < end; head++)
        for (int64_t from = 0; from < tokens; from += BLOCK) {
            int64_t count = tokens - from < BLOCK ? tokens - from : BLOCK;
            const float *mine = job->q + row * s[0][0] + head * s[0][1] + from * s[0][2];
            turn_rows(mine, s[0][2], count, BLOCK, size, STRIP, job->scale, queries);
            memset(result, 0, sizeof(float) * (size_t)(BLOCK * pitch));
            for (int64_t top_row = 0; top_row < count; top_row += STRIP) {
                int64_t strip = count - top_row < STRIP ? count - top_row : STRIP, first, last;
                float inverse[STRIP];
                panels_of(job, row, from + top_row, strip, &first, &last);
                for (int64_t panel = first; panel < last; panel++)
                    score_tile(queries + top_row * size, keys + panel * size * PANEL, size,
                               scores + (panel * BLOCK + top_row) * PANEL);
                for (int64_t i = 0; i < strip; i++) {
                    int64_t query = from + top_row + i, low = first_key(job, row, query);
                    float *line = scores + (first * BLOCK + top_row + i) * PANEL;
                    float top = top_of(line, BLOCK * PANEL, first, last, low, query);
                    float sum = shares_of(line, BLOCK * PANEL, first, last, low, query, top);
                    inverse[i] = low <= query ? 1.0f / sum : 0.0f;
                    sums[(row * job->heads + head) * tokens + query] = low <= query ? top + logf(sum) : 0.0f;
                }
                for (int64_t panel = first; panel < last; panel++)
                    for (int64_t column = 0; column < pitch; column += PANEL)
                        value_tile(scores + (panel * BLOCK + top_row) * PANEL, values + panel * PANEL * pitch + column,
                                   pitch, result + top_row * pitch + column);
                for (int64_t i = 0; i < strip; i++) {
                    const float *line = result + (top_row + i) * pitch;
                    float *to = out + ((row * tokens + from + top_row + i) * job->heads + head) * size;
                    for (int64_t d = 0; d < size; d++) to[d] = line[d] * inverse[i];
                }
            }
        }
    return 1;
}

/* The gradients to one group of keys and values of one row and to the queries of its heads. 0 when there is no
   memory. */
static int attend_back_group(const job_t *job, int64_t row, int64_t group, const float *dout, const float *out,
                             const float *sums, float *dq, float *dk, float *dv) {
    const int64_t(*s)[3] = job->strides;
    int64_t tokens = job->tokens, size = job->size, all = filled(tokens, PANEL), pitch = filled(size, PANEL);
    int64_t shared = job->heads / job->groups, line = job->heads * size;
    int64_t floats = all * (2 * size + 3 * pitch) + BLOCK * (2 * size + 3 * pitch + 2 * all);
    float *keys = room(sizeof(float) * (size_t)floats);
    if (!keys) return 0;
    float *values = keys + all * size, *key_rows = values + all * size, *key_sums = key_rows + all * pitch;
    float *value_sums = key_sums + all * pitch, *queries = value_sums + all * pitch, *ups = queries + BLOCK * size;
    float *query_rows = ups + BLOCK * size, *up_rows = query_rows + BLOCK * pitch, *result = up_rows + BLOCK * pitch;
    float *shares = result + BLOCK * pitch, *slopes = shares + BLOCK * all; /* [panel][BLOCK][PANEL] */
    const float *k = job->k + row * s[1][0] + group * s[1][1], *v = job->v + row * s[2][0] + group * s[2][1];
    turn_rows(k, s[1][2], tokens, all, size, PANEL, 1.0f, keys);
    turn_rows(v, s[2][2], tokens, all, size, PANEL, 1.0f, values);
    copy_rows(k, s[1][2], tokens, all, size, pitch, job->scale, key_rows);
    memset(key_sums, 0, sizeof(float) * (size_t)(2 * all * pitch));
    for (int64_t head = group * shared; head < (group + 1) * shared; head++)
        for (int64_t from = 0; from < tokens; from += BLOCK) {
            int64_t count = tokens - from < BLOCK ? tokens - from : BLOCK, block_first, block_last;
            int64_t at = (row * tokens + from) * line + head * size;
            const float *mine = job->q + row * s[0][0] + head * s[0][1] + from * s[0][2];
            panels_of(job, row, from, count, &block_first, &block_last);
            turn_rows(mine, s[0][2], count, BLOCK, size, STRIP, job->scale, queries);
            turn_rows(dout + at, line, count, BLOCK, size, STRIP, 1.0f, ups);
            copy_rows(mine, s[0][2], count, BLOCK, size, pitch, job->scale, query_rows);
            copy_rows(dout + at, line, count, BLOCK, size, pitch, 1.0f, up_rows);
            memset(result, 0, sizeof(float) * (size_t)(BLOCK * pitch));
            for (int64_t top_row = 0; top_row < count; top_row += STRIP) {
                int64_t strip = count - top_row < STRIP ? count - top_row : STRIP, first, last;
                panels_of(job, row, from + top_row, strip, &first, &last);
                for (int64_t panel = block_first; panel < block_last; panel++) {
                    float *share = shares + (panel * BLOCK + top_row) * PANEL;
                    float *slope = slopes + (panel * BLOCK + top_row) * PANEL;
                    if (first <= panel && panel < last) {
                        score_tile(queries + top_row * size, keys + panel * size * PANEL, size, share);
                        score_tile(ups + top_row * size, values + panel * size * PANEL, size, slope);
                    } else {
                        memset(share, 0, sizeof(float) * STRIP * PANEL);
                        memset(slope, 0, sizeof(float) * STRIP * PANEL);
                    }
                }
                for (int64_t i = top_row; i < top_row + strip; i++) {
                    int64_t query = from + i, low = first_key(job, row, query);
                    const float *o = out + at + i * line, *up = dout + at + i * line;
                    float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
                    for (int64_t d = 0; d < size; d++) delta += o[d] * up[d];
                    shares_of(shares + (first * BLOCK + i) * PANEL, BLOCK * PANEL, first, last, low, query,
                              sums[(row * job->heads + head) * tokens + query]);
                    for (int64_t panel = first; panel < last; panel++) {
                        const float *share = shares + (panel * BLOCK + i) * PANEL;
                        float *slope = slopes + (panel * BLOCK + i) * PANEL;
                        for (int64_t j = 0; j < PANEL; j++) slope[j] = share[j] * (slope[j] - delta);
                    }
                }
                for (int64_t panel = first; panel < last; panel++)
                    for (int64_t column = 0; column < pitch; column += PANEL)
                        value_tile(slopes + (panel * BLOCK + top_row) * PANEL,
                                   key_rows + panel * PANEL * pitch + column, pitch, result + top_row * pitch + column);
                for (int64_t i = top_row; i < top_row + strip; i++)
                    memcpy(dq + at + i * line, result + i * pitch, sizeof(float) * (size_t)size);
            }
            for (int64_t key = block_first * PANEL; key < block_last * PANEL; key += KEYS)
                for (int64_t column = 0; column < pitch; column += PANEL) {
                    int64_t from_share = key / PANEL * BLOCK * PANEL + key % PANEL, to = key * pitch + column;
                    int64_t used = filled(count, STRIP);
                    key_tile(shares + from_share, up_rows + column, pitch, used, value_sums + to);
                    key_tile(slopes + from_share, query_rows + column, pitch, used, key_sums + to);
                }
        }
    for (int64_t key = 0; key < tokens; key++) {
        int64_t to = ((row * tokens + key) * job->groups + group) * size;
        memcpy(dk + to, key_sums + key * pitch, sizeof(float) * (size_t)size);
        memcpy(dv + to, value_sums + key * pitch, sizeof(float) * (size_t)size);
    }
    return 1;
}

/* out [rows, tokens, heads, size], sums [rows, heads, tokens]; size is a multiple of 4. Returns 0 when there is no
   memory. */
API int attend(const float *q, const float *k, const float *v, const int64_t *strides, const int64_t *starts,
               int64_t rows, int64_t heads, int64_t groups, int64_t tokens, int64_t size, int64_t window, float scale,
               float *out, float *sums, int threads) {
    job_t job = {q, k, v, {{0}}, starts, rows, heads, groups, tokens, size, window, scale};
    memcpy(job.strides, strides, sizeof job.strides);
    int64_t shared = heads / groups, each = rows * groups >= 2 * threads ? shared : 1, parts = shared / each;
    int done = 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(&& : done)
    for (int64_t task = 0; task < rows * groups * parts; task++) {
        int64_t row = task / (groups * parts), group = task / parts % groups;
        int64_t begin = group * shared + task % parts * each;
        done = attend_heads(&job, row, group, begin, begin + each, out, sums) && done;
    }
    return done;
}

/* dq [rows, tokens, heads, size], dk and dv [rows, tokens, groups, size] of dout, like out. Returns as `attend`. */
API int attend_back(const float *q, const float *k, const float *v, const int64_t *strides, const int64_t *starts,
                    int64_t rows, int64_t heads, int64_t groups, int64_t tokens, int64_t size, int64_t window,
                    float scale, const float *dout, const float *out, const float *sums, float *dq, float *dk,
                    float *dv, int threads) {
    job_t job = {q, k, v, {{0}}, starts, rows, heads, groups, tokens, size, window, scale};
    memcpy(job.strides, strides, sizeof job.strides);
    int done = 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(&& : done)
    for (int64_t task = 0; task < rows * groups; task++)
        done = attend_back_group(&job, task / groups, task % groups, dout, out, sums, dq, dk, dv) && done;
    return done;
}
