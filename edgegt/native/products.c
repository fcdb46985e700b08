/* Products of int8 matrices whose sums are scaled where they are made: no matrix of 32-bit integers is ever written.

   y [n, m] = rows[:, None] * (a b^T) * columns, with a [n, k] or, turned, [k, n] and b [m, k] or, turned, [k, m]; where
   b has a second plane, b + low / 254 takes its place. Sums are exact as long as they fit 32 bits, as torch's are.

   A task is a block of rows times a block of columns, for one thread. The block of b is packed so that one vector
   holds a word of VALUES values of k of each of its columns, a strip of up to ROWS rows of a is copied beside itself,
   and a tile of strip times PANEL columns stays in registers while k runs: one load of b and one spread word of a for
   each of the processor's dot products. Three of four bytes are known here, and AVX2's of two 16-bit numbers, to which
   strips and panels are widened; where none is, `products` is 0 and the caller uses another library. Widened, both
   planes of b are one number of 16 bits, and one product: 512 of its terms fit 32 bits, so that such sums go on as
   floats. Results do not depend on threads or blocks. A single row of a reads all of b once, so nothing is packed for
   it.  */

#include "panels.h"
#include "room.h"

#define API __attribute__((visibility("default")))

#ifndef DOT
API int products(void) { return 0; }
API int multiply(void) { return 0; }
#else
API int products(void) { return 1; }

/* Columns, rows and packed bytes of a task at most; columns at once of a single row's product, and how many of its
   multiplications are not worth waking a thread for. */
enum { WIDE = 640, TALL = 512, PACKED = 1 << 19, COLUMNS = 4, ALONE = 1 << 18 };
static const float LOW_STEP = 1.0f / STEPS;

/* What a tile does with its sums: adds to what is there, and holds floats. */
enum { MORE = 1, FLOATS = 2 };
typedef float floats_t __attribute__((vector_size(sizeof(sums_t))));

/* tile [rows][PANEL] = start + strip * panel; how: MORE, FLOATS. Of a strip, `down` bytes lead to
   the next row and `along` to the next word. */
static inline __attribute__((always_inline)) void tile_of(int rows, int64_t down, int64_t along, const value_t *strip,
                                                          const value_t *panel, int64_t deep, const int32_t *start,
                                                          int32_t *tile, int how) {
    const uint8_t *a = (const uint8_t *)strip, *b = (const uint8_t *)panel;
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
            if (how & FLOATS) {
                floats_t before = {0};
                if (how & MORE) memcpy(&before, to, sizeof before);
                before += __builtin_convertvector(sum[row][half], floats_t);
                memcpy(to, &before, sizeof before);
            } else {
                sums_t before = {0};
                if (how & MORE) memcpy(&before, to, sizeof before);
                before += sum[row][half];
                memcpy(to, &before, sizeof before);
            }
        }
}

typedef void tile_t(const value_t *, const value_t *, int64_t, const int32_t *, int32_t *, int);
#define NAMED(name, rows, down, along)                                                                               \
    static void name(const value_t *a, const value_t *b, int64_t deep, const int32_t *start, int32_t *tile,          \
                     int how) {                                                                                      \
        tile_of(rows, down, along, a, b, deep, start, tile, how);                                                    \
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

/* Whether both planes are one number; and how many have sums of their own. */
static inline int is_joint(const job_t *job) { return JOINT && job->low && !job->turned_b; }

static inline int planes_of(const job_t *job) { return job->low && !is_joint(job) ? 2 : 1; }

/* One row of a tile: y [size] from its sums, and those of the second plane, or from those of both in one. */
static inline __attribute__((always_inline)) void scale_row(const job_t *job, const int32_t *high, const int32_t *low,
                                                            float scale, const float *columns, int64_t size, float *y,
                                                            int joint) {
    if (joint)
        for (int64_t i = 0; i < size; i++) {
            float sum;
            memcpy(&sum, high + i, sizeof sum);
            y[i] = sum * LOW_STEP * scale * columns[i];
        }
    else if (job->low)
        for (int64_t i = 0; i < size; i++)
            y[i] = ((float)high[i] + (float)low[i] * LOW_STEP) * scale * columns[i];
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
    int joint = is_joint(job);
    for (int64_t i = 0; i < count; i++) {
        const int32_t *high = tile + i * PANEL, *low = high + ROWS * PANEL;
        float *y = job->y + (row + i) * job->m + column, scale = job->rows[row + i];
        if (width >= PANEL)
            scale_row(job, high, low, scale, columns, PANEL, y, joint);
        else
            scale_row(job, high, low, scale, columns, width, y, joint);
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
    int planes = planes_of(job), joint = is_joint(job);
    int64_t panels = (width + PANEL - 1) / PANEL, strips = parts_of(rows, ROWS), strip_rows = even(rows, strips, 1);
    int whole = depth >= job->k;
    size_t panel_values = (size_t)words(depth) * VALUES * PANEL, tile = ROWS * PANEL, tiles = tile * planes * panels;
    size_t packed_bytes = panel_values * sizeof(value_t) * planes * panels;
    size_t sum_bytes = (whole ? planes * tile : strips * tiles) * sizeof(int32_t);
    uint8_t *memory = room(packed_bytes + sum_bytes + STRIP);
    if (!memory) return 0;
    value_t *packed = (value_t *)memory, *strip = (value_t *)(memory + packed_bytes + sum_bytes);
    int32_t *sums = (int32_t *)(memory + packed_bytes), start[ROWS];
    for (int64_t from = 0; from < job->k; from += depth) {
        int64_t k = job->k - from < depth ? job->k - from : depth;
        int last = from + k == job->k;
        for (int64_t panel = 0; panel < panels; panel++)
            for (int plane = 0; plane < planes; plane++) {
                const int8_t *b = plane ? job->low : job->b;
                int64_t first = column + panel * PANEL, left = width - panel * PANEL;
                value_t *to = packed + (panel * planes + plane) * panel_values;
                if (job->turned_b)
                    pack_columns(b + from * job->m + first, job->m, left, k, to);
                else
                    pack_rows(b + first * job->k + from, joint ? job->low + first * job->k + from : 0, job->k, left, k,
                              to);
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
                    const value_t *b = packed + (panel * planes + plane) * panel_values;
                    TILES[job->turned_a][count](strip, b, words(k), start, here + plane * tile,
                                                 (from > 0 ? MORE : 0) | (joint ? FLOATS : 0));
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
    int64_t planes = planes_of(job), best = INT64_MAX;
    int64_t widest = PACKED / (planes * depth * (int64_t)sizeof(value_t)) / PANEL * PANEL;
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

/* Sums of k values of one row of a with those of `count` rows of b, which are `stride` apart. */
static inline __attribute__((always_inline)) void sums_of(int count, const int8_t *a, const int8_t *b, int64_t stride,
                                                          int64_t k, int32_t *out) {
    sums_t sums[COLUMNS] = {{0}}, ones = {0}, flip = (sums_t){0} + (int32_t)(OFFSET * 0x01010101u);
    int64_t at = 0;
    for (; at + PIECE <= k; at += PIECE) {
        sums_t left = piece_of(a + at, PIECE);
        if (OFFSET) ones = DOT(ones, (sums_t){0} + 0x01010101, left);
        for (int j = 0; j < count; j++) {
            __builtin_prefetch(b + (j + 2 * COLUMNS) * stride + at);
            sums[j] = DOT(sums[j], piece_of(b + j * stride + at, PIECE) ^ flip, left);
        }
    }
    uint32_t added = 0; /* by the offset; unsigned numbers may go round */
    for (int lane = 0; lane < LANES; lane++) added += OFFSET * (uint32_t)ones[lane];
    for (int j = 0; j < count; j++) {
        uint32_t sum = -added;
        for (int lane = 0; lane < LANES; lane++) sum += (uint32_t)sums[j][lane];
        for (int64_t i = at; i < k; i++) sum += (uint32_t)((int32_t)a[i] * b[j * stride + i]);
        out[j] = (int32_t)sum;
    }
}

/* `size` columns of one row's product, from `first`; `depth` values of k at a time, as everywhere. */
static void columns_of(const job_t *job, int64_t first, int64_t size, int64_t depth) {
    int joint = is_joint(job);
    int32_t sums[2][PANEL];
    float together[PANEL] = {0};
    for (int64_t from = 0; from < job->k; from += joint ? depth : job->k) {
        int64_t k = joint && job->k - from > depth ? depth : job->k - from;
        const int8_t *a = job->a + from;
        for (int plane = 0; plane < (job->low ? 2 : 1); plane++) {
            const int8_t *b = (plane ? job->low : job->b) + first * job->k + from;
            int64_t j = 0;
            for (; j + COLUMNS <= size; j += COLUMNS)
                sums_of(COLUMNS, a, b + j * job->k, job->k, k, sums[plane] + j);
            for (; j < size; j++) sums_of(1, a, b + j * job->k, job->k, k, sums[plane] + j);
        }
        for (int64_t j = 0; joint && j < size; j++) together[j] += (float)(sums[0][j] * STEPS + sums[1][j]);
    }
    if (joint) memcpy(sums[0], together, sizeof together);
    scale_row(job, sums[0], sums[1], job->rows[0], job->columns ? job->columns + first : 0, size, job->y + first,
              joint);
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
    int64_t depth = even(k, parts_of(k, is_joint(&job) ? JOINT_DEEP : DEEP), VALUES), width = m, height = n;
    if (n == 1 && !turned_a && !turned_b) {
        int64_t panels = parts_of(m, PANEL);
#pragma omp parallel for num_threads(m * k < ALONE ? 1 : threads) schedule(static)
        for (int64_t panel = 0; panel < panels; panel++)
            columns_of(&job, panel * PANEL, panel < panels - 1 ? PANEL : m - panel * PANEL, depth);
        return 1;
    }
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
