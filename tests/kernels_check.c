/* The compiled products and attention against plain sums in double, by one program that can be built for any processor
   (tests/test_native_targets.py). Prints the largest errors; exit code 1 when one is too large. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int products(void);
int multiply(const int8_t *a, int turned_a, const int8_t *b, const int8_t *low, int turned_b, const float *rows,
             const float *columns, int64_t n, int64_t m, int64_t k, int add, float *y, int threads);
int attend(const float *q, const float *k, const float *v, const int64_t *strides, const int64_t *starts, int64_t rows,
           int64_t heads, int64_t groups, int64_t tokens, int64_t size, int64_t window, float scale, float *out,
           float *sums, int threads);
int attend_back(const float *q, const float *k, const float *v, const int64_t *strides, const int64_t *starts,
                int64_t rows, int64_t heads, int64_t groups, int64_t tokens, int64_t size, int64_t window, float scale,
                const float *dout, const float *out, const float *sums, float *dq, float *dk, float *dv, int threads);

enum { PRODUCTS = 120, ATTENTIONS = 16, MOST_TOKENS = 120, MOST_SIZE = 64 };

static uint32_t state = 1;

static uint32_t draw(uint32_t below) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % below;
}

static float number(void) { return (float)draw(2001) / 1000.0f - 1.0f; }

static float *numbers(int64_t count) {
    float *values = malloc(sizeof(float) * (size_t)count);
    for (int64_t i = 0; i < count; i++) values[i] = number();
    return values;
}

static int8_t *integers(int64_t count) {
    int8_t *values = malloc((size_t)count);
    for (int64_t i = 0; i < count; i++) values[i] = (int8_t)((int)draw(255) - 127);
    return values;
}

static void note(double *worst, double found, double expected) {
    double error = fabs(found - expected) / (fabs(expected) + 1.0);
    if (!(error <= *worst)) *worst = error; /* true for what is no number, which stays */
}

static double product_error(int turn) {
    int64_t n = 1 + draw(40), m = 1 + draw(90), k = turn % 10 ? 1 + draw(70) : 1500 + draw(800);
    if (turn % 15 == 0) n = 500 + draw(40);
    int turned_a = (int)draw(2), turned_b = (int)draw(2), two = !turned_a && draw(2);
    int8_t *a = integers(n * k), *b = integers(m * k), *low = integers(m * k);
    float *rows = numbers(n), *columns = numbers(m), *y = numbers(n * m);
    double worst = 0.0;
    if (!multiply(a, turned_a, b, two ? low : 0, turned_b, rows, two ? columns : 0, n, m, k, 0, y, 2)) return INFINITY;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < m; j++) {
            double high = 0.0, rest = 0.0, scale = (double)rows[i] * (two ? columns[j] : 1.0f);
            for (int64_t l = 0; l < k; l++) {
                int64_t at = turned_b ? l * m + j : j * k + l;
                int factor = turned_a ? a[l * n + i] : a[i * k + l];
                high += factor * b[at];
                rest += two ? factor * low[at] / 254.0 : 0.0;
            }
            /* Sums are exact: what is left is rounding of the two, which may cancel. */
            double size = (fabs(high) + fabs(rest) + 1.0) * fabs(scale) + 1e-30;
            note(&worst, y[i * m + j] / size, (high + rest) * scale / size);
        }
    free(a), free(b), free(low), free(rows), free(columns), free(y);
    return worst;
}

static double attention_error(int turn) {
    int64_t rows = 1 + draw(2), groups = 1 + draw(2), shared = 1 + draw(2), heads = groups * shared;
    int64_t tokens = 1 + draw(MOST_TOKENS - 1), size = 4 * (1 + draw(MOST_SIZE / 4)), window = turn % 3 ? 0 : 1 + draw(30);
    int64_t starts[2] = {draw((uint32_t)tokens), 0}, one = tokens * size;
    int64_t strides[9] = {heads * one, one, size, groups * one, one, size, groups * one, one, size};
    int64_t of_q = rows * heads * one, of_k = rows * groups * one;
    float *q = numbers(of_q), *k = numbers(of_k), *v = numbers(of_k), *up = numbers(of_q), *out = numbers(of_q);
    float *sums = numbers(rows * heads * tokens), *dq = numbers(of_q), *dk = numbers(of_k), *dv = numbers(of_k);
    double *key_sums = calloc((size_t)of_k, sizeof(double)), *value_sums = calloc((size_t)of_k, sizeof(double));
    double worst = 0.0, share[MOST_TOKENS], mean[MOST_SIZE], slope[MOST_SIZE];
    if (!attend(q, k, v, strides, starts, rows, heads, groups, tokens, size, window, 0.3f, out, sums, 2) ||
        !attend_back(q, k, v, strides, starts, rows, heads, groups, tokens, size, window, 0.3f, up, out, sums, dq, dk,
                     dv, 2))
        return INFINITY;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t i = 0; i < tokens; i++) {
                int64_t first = starts[row], to = ((row * tokens + i) * heads + head) * size;
                if (window && i - window + 1 > first) first = i - window + 1;
                const float *mine = q + ((row * heads + head) * tokens + i) * size;
                double whole = 0.0, delta = 0.0;
                for (int64_t d = 0; d < size; d++) mean[d] = slope[d] = 0.0;
                for (int64_t j = first; j <= i; j++) {
                    const float *key = k + ((row * groups + head / shared) * tokens + j) * size;
                    double score = 0.0;
                    for (int64_t d = 0; d < size; d++) score += mine[d] * key[d];
                    whole += share[j] = exp(0.3 * score);
                }
                for (int64_t j = first; j <= i; j++) {
                    share[j] /= whole;
                    for (int64_t d = 0; d < size; d++)
                        mean[d] += share[j] * v[((row * groups + head / shared) * tokens + j) * size + d];
                }
                for (int64_t d = 0; d < size; d++) delta += mean[d] * up[to + d];
                for (int64_t j = first; j <= i; j++) {
                    int64_t at = ((row * groups + head / shared) * tokens + j) * size;
                    int64_t sum = ((row * tokens + j) * groups + head / shared) * size;
                    double rise = 0.0;
                    for (int64_t d = 0; d < size; d++) rise += up[to + d] * v[at + d];
                    rise = 0.3 * share[j] * (rise - delta);
                    for (int64_t d = 0; d < size; d++) {
                        slope[d] += rise * k[at + d];
                        key_sums[sum + d] += rise * mine[d];
                        value_sums[sum + d] += share[j] * up[to + d];
                    }
                }
                for (int64_t d = 0; d < size; d++) {
                    note(&worst, out[to + d], mean[d]);
                    note(&worst, dq[to + d], slope[d]);
                }
            }
    for (int64_t i = 0; i < of_k; i++) {
        note(&worst, dk[i], key_sums[i]);
        note(&worst, dv[i], value_sums[i]);
    }
    free(q), free(k), free(v), free(up), free(out), free(sums), free(dq), free(dk), free(dv);
    free(key_sums), free(value_sums);
    return worst;
}

int main(void) {
    double of_products = 0.0, of_attention = 0.0;
    for (int turn = 0; products() && turn < PRODUCTS; turn++) {
        double error = product_error(turn);
        if (!(error <= of_products)) of_products = error;
    }
    for (int turn = 0; turn < ATTENTIONS; turn++) {
        double error = attention_error(turn);
        if (!(error <= of_attention)) of_attention = error;
    }
    printf("products %s %.1e attention %.1e\n", products() ? "compiled" : "none", of_products, of_attention);
    return !(of_products <= 5e-7 && of_attention <= 1e-5);
}
