// Products of 8-bit integers. A row x is scale * (u - 128) with u from 1 to 255, a column of weights is its scale times
// integers w from -127 to 127:
//
//   x * column = row scale * column scale * (sum of u w - 128 * sum of w)
//
// A row's scale is its largest magnitude over 127 and is found when the row is (dynamic quantization); the second sum is
// Matrix::offsets. Sums of integers are exact, so every CPU has the same. Up to 2^31 / (255 * 127) = 66,310 inputs fit.
#pragma once

#include <cmath>

#include "vectors.h"

namespace kitae {

// Sixteen times four neighbours.
inline u32x16 load_quads(const int8_t* from) {
    u32x16 x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// Four neighbours.
inline uint32_t quad_at(const uint8_t* from) {
    uint32_t quad;
    std::memcpy(&quad, from, sizeof quad);
    return quad;
}

inline i32x16 load_integers(const int32_t* from) {
    i32x16 x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store(int32_t* to, i32x16 x) { std::memcpy(to, &x, sizeof x); }

// sum + u0 * w0 + ... + u3 * w3, where `quad` is the integers u0 ... u3 and each lane of `weights` its own w0 ... w3.
inline __attribute__((always_inline)) i32x16 add_quads(i32x16 sum, uint32_t quad, u32x16 weights) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)(quad - u32x16{}), (__m512i)weights);
#else
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const i32x16 weight = (i32x16)(weights << (24 - 8 * i)) >> 24;  // with its sign
        sum += weight * int32_t(quad >> (8 * i) & 255u);
    }
    return sum;
#endif
}

// A row as integers; returns its scale. A number that is not finite makes the scale so, and all integers 0 (128), whose
// products with it are NaN. 16 divides `size`.
template <class T> float quantise_row(const T* x, int64_t size, uint8_t* out) {
    i32x16 most{};  // magnitudes are ordered as their bits are, with NaN above all
    for (int64_t j = 0; j < size; j += LANES) {
        const i32x16 magnitude = (i32x16)load(x + j) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    int32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits = most[i] > bits ? most[i] : bits;
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    if (!std::isfinite(largest)) {
        std::memset(out, 128, size_t(size));
        return largest;
    }
    if (largest < 1e-30f) largest = 1e-30f;  // a row of zeros
    const float inverse = 127.0f / largest;
    for (int64_t j = 0; j < size; j += LANES) {
        const f32x16 scaled = load(x + j) * inverse;
        for (int i = 0; i < LANES; i++) out[j + i] = uint8_t(int32_t(std::rint(scaled[i])) + 128);
    }
    return largest / 127.0f;
}

}  // namespace kitae
