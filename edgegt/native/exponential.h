/* The exponential that both softmax and gates are made of: plain C, which becomes vector instructions. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

/* e^x for x <= 0 to 2 units in the last place; below -87 it is e^-87. Polynomial on [-ln 2 / 2, ln 2 / 2]. */
static inline float exp_of(float x) {
    x = x > -87.0f ? x : -87.0f;
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}
