/* Products of int8 matrices whose sums are scaled where they are made: no matrix of 32-bit integers is ever written.

   y [n, m] = rows[:, None] * (a b^T) * columns, with a [n, k] or, turned, [k, n] and b [m, k] or, turned, [k, m]; where
   b has a second plane, b + low / 254 takes its place. Sums are exact as long as they fit 32 bits, as torch's are.

   A task is a block of rows times a block of columns, for one thread. The block of b is packed so that one vector
   holds four values of k of each of its columns, a strip of up to ROWS rows of a is copied beside itself, and a tile
   of strip times PANEL columns stays in registers while k runs: one load of b and one spread word of a for each
   multiplication of the processor's four-fold dot product. Three of those are known here; where none is, `products`
   is 0 and the caller uses another library. Results do not depend on threads or blocks. A single row of a reads all of
   b once, so nothing is packed for it.  */

#include "room.h"
#include "shuffles.h"

#define API __attribute__((visibility("default")))

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
#endif

#ifndef DOT
API int products(void) { return 0; }
API int multiply(void) { return 0; }
#else
API int products(void) { return 1; }

/* Columns of a tile; values of k at once; bytes from one row of a strip to the next, from four values of k to the next
   four of a turned one, and of a strip; columns, rows and packed bytes of a task at most; columns at once of a single
   row's product, and how many of its multiplications are not worth waking a thread for. */
enum {
    PANEL = 2 * LANES,
    DEEP = 1536,
    STRIDE = DEEP + 64,
    TURNED = (ROWS * 4 + 15) / 16 * 16,
    STRIP = ROWS * STRIDE > DEEP / 4 * TURNED ? ROWS * STRIDE : DEEP / 4 * TURNED + 64,
    WIDE = 640,
    TALL = 512,
    PACKED = 1 << 19,
    COLUMNS = 4,
    ALONE = 1 << 18
};
static const float LOW_STEPS = 254.0f;

/* offset: turns signed values to unsigned ones where the processor wants them. */
static inline bytes_t load(const int8_t *from, uint8_t offset) {
    bytes_t value;
    memcpy(&value, from, 16);
    return value ^ offset;
}

static inline void store(void *to, bytes_t value) { memcpy(to, &value, 16); }

/* Of 16 columns of 4 rows, the 4 values of each column side by side; the first 4 * vectors columns are written. */
static inline void interleave(const int8_t *from, int64_t stride, uint8_t offset, int vectors, void *to) {
    bytes_t b0 = load(from, offset), b1 = load(from + stride, offset);
    bytes_t b2 = load(from + 2 * stride, offset), b3 = load(from + 3 * stride, offset);
    pairs_t l0 = (pairs_t)LOW_BYTES(b0, b1), l1 = (pairs_t)LOW_BYTES(b2, b3);
    pairs_t h0 = (pairs_t)HIGH_BYTES(b0, b1), h1 = (pairs_t)HIGH_BYTES(b2, b3);
    store(to, (bytes_t)LOW_PAIRS(l0, l1));
    store((uint8_t *)to + 16, (bytes_t)HIGH_PAIRS(l0, l1));
    if (vectors > 2) store((uint8_t *)to + 32, (bytes_t)LOW_PAIRS(h0, h1));
    if (vectors > 3) store((uint8_t *)to + 48, (bytes_t)HIGH_PAIRS(h0, h1));
}

/* One panel of b: packed [ceil(k / 4)][PANEL][4], from rows b[j][0..k) or, turned, from columns b[0..k)[j]. What lies
   beyond its `width` columns and its k values is 0. */
static void pack_rows(const int8_t *b, int64_t stride, int64_t width, int64_t k, uint8_t *packed) {
    int64_t deep = (k + 3) / 4;
    for (int64_t column = 0; column < PANEL; column += 4) {
        int64_t at = 0;
        uint8_t *to = packed + column * 4;
        if (column + 4 <= width) {
            const int8_t *from = b + column * stride;
            for (; at + 4 <= k / 4; at += 4) {
                for (int64_t i = 4; i < 8; i++) __builtin_prefetch(from + i * stride + 4 * at);
                words_t rows[4];
                for (int64_t i = 0; i < 4; i++) rows[i] = (words_t)load(from + i * stride + 4 * at, OFFSET);
                turn_words(rows, to + at * PANEL * 4, PANEL * 4);
            }
        }
        for (; at < deep; at++)
            for (int64_t j = 0; j < 4; j++)
                for (int64_t i = 0; i < 4; i++) {
                    int inside = column + j < width && 4 * at + i < k;
                    to[at * PANEL * 4 + 4 * j + i] =
                        inside ? (uint8_t)(b[(column + j) * stride + 4 * at + i] ^ OFFSET) : 0;
                }
    }
}

static void pack_columns(const int8_t *b, int64_t stride, int64_t width, int64_t k, uint8_t *packed) {
    for (int64_t at = 0; at < (k + 3) / 4; at++) {
        const int8_t *from = b + 4 * at * stride;
        uint8_t *to = packed + at * PANEL * 4;
        int64_t column = 0;
        if (4 * at + 4 <= k)
            for (; column + 16 <= width && column + 16 <= PANEL; column += 16) {
                for (int64_t i = 4; i < 8; i++) __builtin_prefetch(from + i * stride + column);
                interleave(from + column, stride, OFFSET, 4, to + column * 4);
            }
        for (; column < PANEL; column++)
            for (int64_t i = 0; i < 4; i++) {
                int inside = column < width && 4 * at + i < k;
                to[column * 4 + i] = inside ? (uint8_t)(from[i * stride + column] ^ OFFSET) : 0;
            }
    }
}

/* A strip of a, its rows STRIDE bytes apart and filled up with 0; start: what undoes the offset of b, per row. */
static void copy_rows(const int8_t *a, int64_t stride, int64_t rows, int64_t k, int8_t *strip, int32_t *start) {
    enum { SIZE = sizeof(sums_t) };
    for (int64_t row = 0; row < rows; row++) {
        const int8_t *from = a + row * stride;
        int8_t *to = strip + row * STRIDE;
        sums_t part, sum = {0}, ones = (sums_t){0} + 0x01010101;
        for (int64_t i = 0; i < k; i += SIZE) {
            part = (sums_t){0};
            if (i + SIZE <= k)
                memcpy(&part, from + i, SIZE);
            else
                memcpy(&part, from + i, (size_t)(k - i));
            memcpy(to + i, &part, SIZE);
            sum = DOT(sum, ones, part);
        }
        start[row] = 0;
        for (int i = 0; i < LANES; i++) start[row] -= OFFSET * sum[i];
    }
}

/* A strip of turned a [k][stride], four values of k of each row side by side and TURNED bytes apart. left: columns of a
   from its start on, which are all that may be read. */
static void copy_columns(const int8_t *a, int64_t stride, int64_t left, int64_t k, int8_t *strip, int32_t *start) {
    int8_t last[4][16] = {{0}};
    for (int64_t at = 0; at < k; at += 4) {
        const int8_t *from = a + at * stride;
        int8_t *to = strip + at / 4 * TURNED;
        int64_t pitch = stride;
        if (at + 4 > k || left < 16) {
            for (int64_t i = 0; i < 4; i++)
                for (int64_t j = 0; j < 16; j++) last[i][j] = at + i < k && j < left ? from[i * stride + j] : 0;
            from = last[0], pitch = 16;
        } else {
            for (int64_t i = 16; i < 20; i++) __builtin_prefetch(from + i * stride);
        }
        interleave(from, pitch, 0, TURNED / 16, to);
    }
    sums_t part, sum[2] = {{0}, {0}}, ones = (sums_t){0} + 0x01010101;
    for (int64_t at = 0; OFFSET && at < k; at += 4) { /* one vector has a row in each of its first lanes */
        memcpy(&part, strip + at / 4 * TURNED, sizeof part);
        sum[at / 4 % 2] = DOT(sum[at / 4 % 2], ones, part);
    }
    for (int64_t row = 0; row < ROWS; row++) start[row] = OFFSET ? -OFFSET * (sum[0][row] + sum[1][row]) : 0;
}

/* tile [rows][PANEL] = start + strip * panel, or with `more` added to what is there. Of a strip, `down` bytes lead to
   the next row and `along` to the next four of k. */
static inline __attribute__((always_inline)) void tile_of(int rows, int64_t down, int64_t along, const int8_t *a,
                                                          const uint8_t *b, int64_t deep, const int32_t *start,
                                                          int32_t *tile, int more) {
    sums_t sum[ROWS][2];
    for (int row = 0; row < rows; row++) sum[row][0] = sum[row][1] = (sums_t){0} + start[row];
    for (int64_t at = 0; at < deep; at++) {
        sums_t left, right;
        memcpy(&left, b + at * PANEL * 4, sizeof left);
        memcpy(&right, b + at * PANEL * 4 + sizeof left, sizeof right);
        UNROLLED for (int row = 0; row < rows; row++) {
            int32_t word;
            memcpy(&word, a + row * down + at * along, 4);
            sums_t spread = (sums_t){0} + word;
            sum[row][0] = DOT(sum[row][0], left, spread);
            sum[row][1] = DOT(sum[row][1], right, spread);
        }
    }
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < 2; half++) {
            int32_t *to = tile + row * PANEL + half * LANES;
            sums_t before = {0};
            if (more) memcpy(&before, to, sizeof before);
            before += sum[row][half];
            memcpy(to, &before, sizeof before);
        }
}

typedef void tile_t(const int8_t *, const uint8_t *, int64_t, const int32_t *, int32_t *, int);
#define NAMED(name, rows, down, along)                                                                               \
    static void name(const int8_t *a, const uint8_t *b, int64_t deep, const int32_t *start, int32_t *tile, int more) \
    {                                                                                                                \
        tile_of(rows, down, along, a, b, deep, start, tile, more);                                                   \
    }
#define TILE(rows) NAMED(tile_##rows, rows, STRIDE, 4) NAMED(turned_##rows, rows, 4, TURNED)
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#define SIX(name) name##_1, name##_2, name##_3, name##_4, name##_5, name##_6
#if ROWS > 6
TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#define TILES_OF(name) {0, SIX(name), name##_7, name##_8, name##_9, name##_10, name##_11, name##_12}
#else
#define TILES_OF(name) {0, SIX(name)}
#endif
static tile_t *const TILES[2][ROWS + 1] = {TILES_OF(tile), TILES_OF(turned)};

typedef struct {
    const int8_t *a, *b, *low;
    const float *rows, *columns;
    float *y;
    int64_t n, m, k;
    int turned_a, turned_b, add;
} job_t;

/* One row of a tile: y [size] from its sums, and those of the second plane. */
static inline __attribute__((always_inline)) void scale_row(const job_t *job, const int32_t *high, const int32_t *low,
                                                            float scale, const float *columns, int64_t size,
                                                            float *y) {
    if (job->low)
        for (int64_t i = 0; i < size; i++)
            y[i] = ((float)high[i] + (float)low[i] * (1.0f / LOW_STEPS)) * scale * columns[i];
    else if (job->columns)
        for (int64_t i = 0; i < size; i++) y[i] = (float)high[i] * scale * columns[i];
    else if (job->add)
        for (int64_t i = 0; i < size; i++) y[i] += (float)high[i] * scale;
    else
        for (int64_t i = 0; i < size; i++) y[i] = (float)high[i] * scale;
}

/* y of `count` rows from `row` and `width` columns from `column`, from their sums in one tile for each plane. */
static inline void scale_tile(const job_t *job, const int32_t *tile, int64_t row, int64_t count, int64_t column,
                              int64_t width) {
    const float *columns = job->columns + column;
    for (int64_t i = 0; i < count; i++) {
        const int32_t *high = tile + i * PANEL, *low = high + ROWS * PANEL;
        float *y = job->y + (row + i) * job->m + column, scale = job->rows[row + i];
        if (width >= PANEL)
            scale_row(job, high, low, scale, columns, PANEL, y);
        else
            scale_row(job, high, low, scale, columns, width, y);
    }
}

/* Ask for the memory of a tile's y while its sums are formed. */
static inline void expect(const job_t *job, int64_t row, int64_t count, int64_t column) {
    for (int64_t i = 0; i < count; i++) {
        const float *y = job->y + (row + i) * job->m + column;
        __builtin_prefetch(y, 1);
        __builtin_prefetch(y + PANEL / 2, 1);
        __builtin_prefetch(y + PANEL - 1, 1);
    }
}

static int64_t parts_of(int64_t whole, int64_t largest) { return whole > largest ? (whole + largest - 1) / largest : 1; }

static int64_t even(int64_t whole, int64_t parts, int64_t multiple) {
    int64_t part = (whole + parts - 1) / parts;
    return (part + multiple - 1) / multiple * multiple;
}

/* One task; 0 when there is no memory. */
static int block_of(const job_t *job, int64_t row, int64_t rows, int64_t column, int64_t width, int64_t depth) {
    int planes = job->low ? 2 : 1;
    int64_t panels = (width + PANEL - 1) / PANEL, strips = parts_of(rows, ROWS), strip_rows = even(rows, strips, 1);
    int whole = depth >= job->k;
    size_t panel_bytes = (size_t)(depth + 3) / 4 * 4 * PANEL, tile = ROWS * PANEL, tiles = tile * planes * panels;
    size_t packed_bytes = panel_bytes * planes * panels;
    size_t sum_bytes = (whole ? planes * tile : strips * tiles) * sizeof(int32_t);
    uint8_t *packed = room(packed_bytes + sum_bytes + STRIP);
    if (!packed) return 0;
    int32_t *sums = (int32_t *)(packed + packed_bytes), start[ROWS];
    int8_t *strip = (int8_t *)packed + packed_bytes + sum_bytes;
    for (int64_t from = 0; from < job->k; from += depth) {
        int64_t k = job->k - from < depth ? job->k - from : depth;
        int last = from + k == job->k;
        for (int64_t panel = 0; panel < panels; panel++)
            for (int plane = 0; plane < planes; plane++) {
                const int8_t *b = plane ? job->low : job->b;
                int64_t first = column + panel * PANEL, left = width - panel * PANEL;
                uint8_t *to = packed + (panel * planes + plane) * panel_bytes;
                if (job->turned_b)
                    pack_columns(b + from * job->m + first, job->m, left, k, to);
                else
                    pack_rows(b + first * job->k + from, job->k, left, k, to);
            }
        for (int64_t at = 0; at < strips; at++) {
            int64_t top = row + at * strip_rows, count = row + rows - top;
            if (count <= 0) break;
            count = count < strip_rows ? count : strip_rows;
            int32_t *here = sums + (whole ? 0 : at * tiles);
            if (job->turned_a)
                copy_columns(job->a + from * job->n + top, job->n, job->n - top, k, strip, start);
            else
                copy_rows(job->a + top * job->k + from, job->k, count, k, strip, start);
            for (int64_t panel = 0; panel < panels; panel++, here += whole ? 0 : planes * tile) {
                int64_t first = column + panel * PANEL;
                if (last) expect(job, top, count, first);
                for (int plane = 0; plane < planes; plane++) {
                    const uint8_t *b = packed + (panel * planes + plane) * panel_bytes;
                    TILES[job->turned_a][count](strip, b, (k + 3) / 4, start, here + plane * tile, from > 0);
                }
                if (last) scale_tile(job, here, top, count, first, width - panel * PANEL);
            }
        }
    }
    return 1;
}

/* Width and height of a task, so that the threads end soonest. Counted in multiplications of a tile's row: packing a
   panel takes as long as 16 of them, and copying a row of a as long as half a one, or one when it is turned. */
static void split(const job_t *job, int64_t depth, int threads, int64_t *width, int64_t *height) {
    int64_t planes = job->low ? 2 : 1, best = INT64_MAX, widest = PACKED / (planes * depth) / PANEL * PANEL;
    widest = widest < PANEL ? PANEL : widest > WIDE ? WIDE : widest;
    for (int64_t across = parts_of(job->m, widest); across <= parts_of(job->m, PANEL); across++) {
        int64_t wide = even(job->m, across, PANEL), panels = wide / PANEL * planes;
        for (int64_t down = depth < job->k ? parts_of(job->n, TALL) : 1; down <= parts_of(job->n, ROWS); down *= 2) {
            int64_t tall = even(job->n, down, ROWS), tasks = parts_of(job->m, wide) * parts_of(job->n, tall);
            int64_t each = 2 * panels * (tall + 16) + tall * (1 + job->turned_a);
            int64_t end = (tasks + threads - 1) / threads * each;
            if (end < best) best = end, *width = wide, *height = tall;
        }
        if (across > 4 * threads && across > 2 * parts_of(job->m, widest)) break;
    }
}

/* Sums of one row of a [k] with `count` rows of b [k each]. */
static inline __attribute__((always_inline)) void sums_of(int count, const int8_t *a, const int8_t *b, int64_t k,
                                                          int32_t *out) {
    typedef uint8_t wide_t __attribute__((vector_size(4 * LANES)));
    sums_t sums[COLUMNS] = {{0}}, ones = {0};
    int64_t at = 0;
    for (; at + 4 * LANES <= k; at += 4 * LANES) {
        wide_t left, right;
        memcpy(&left, a + at, sizeof left);
        if (OFFSET) ones = DOT(ones, (wide_t){0} + 1, left);
        for (int j = 0; j < count; j++) {
            __builtin_prefetch(b + (j + 2 * COLUMNS) * k + at);
            memcpy(&right, b + j * k + at, sizeof right);
            sums[j] = DOT(sums[j], right ^ (uint8_t)OFFSET, left);
        }
    }
    uint32_t added = 0; /* by the offset; unsigned numbers may go round */
    for (int lane = 0; lane < LANES; lane++) added += OFFSET * (uint32_t)ones[lane];
    for (int j = 0; j < count; j++) {
        uint32_t sum = -added;
        for (int lane = 0; lane < LANES; lane++) sum += (uint32_t)sums[j][lane];
        for (int64_t i = at; i < k; i++) sum += (uint32_t)((int32_t)a[i] * b[j * k + i]);
        out[j] = (int32_t)sum;
    }
}

/* `size` columns of one row's product, from `first`. */
static void columns_of(const job_t *job, int64_t first, int64_t size) {
    int32_t sums[2][PANEL];
    for (int plane = 0; plane < (job->low ? 2 : 1); plane++) {
        const int8_t *b = (plane ? job->low : job->b) + first * job->k;
        int64_t j = 0;
        for (; j + COLUMNS <= size; j += COLUMNS) sums_of(COLUMNS, job->a, b + j * job->k, job->k, sums[plane] + j);
        for (; j < size; j++) sums_of(1, job->a, b + j * job->k, job->k, sums[plane] + j);
    }
    scale_row(job, sums[0], sums[1], job->rows[0], job->columns ? job->columns + first : 0, size, job->y + first);
}

/* y [n, m], added to with `add` (which goes with neither low nor columns). Returns 0 when there is no memory. */
API int multiply(const int8_t *a, int turned_a, const int8_t *b, const int8_t *low, int turned_b, const float *rows,
                 const float *columns, int64_t n, int64_t m, int64_t k, int add, float *y, int threads) {
    job_t job = {a, b, low, rows, columns, y, n, m, k, turned_a, turned_b, add};
    if (n == 0 || m == 0) return 1;
    if (k == 0) {
        if (!add) memset(y, 0, sizeof(float) * (size_t)(n * m));
        return 1;
    }
    if (n == 1 && !turned_a && !turned_b) {
        int64_t panels = parts_of(m, PANEL);
#pragma omp parallel for num_threads(m * k < ALONE ? 1 : threads) schedule(static)
        for (int64_t panel = 0; panel < panels; panel++)
            columns_of(&job, panel * PANEL, panel < panels - 1 ? PANEL : m - panel * PANEL);
        return 1;
    }
    int64_t depth = even(k, parts_of(k, DEEP), 4), width = m, height = n;
    split(&job, depth, threads, &width, &height);
    int64_t across = parts_of(m, width), down = parts_of(n, height);
    int done = 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(&& : done)
    for (int64_t task = 0; task < across * down; task++) {
        int64_t row = task / across * height, column = task % across * width;
        int64_t tall = n - row < height ? n - row : height, wide = m - column < width ? m - column : width;
        done = block_of(&job, row, tall, column, wide, depth) && done;
    }
    return done;
}
#endif
