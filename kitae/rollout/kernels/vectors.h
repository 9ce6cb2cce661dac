// Sixteen numbers at a time. The compiler turns these into AVX-512, two AVX2 halves or four NEON quarters.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace kitae {

constexpr int LANES = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

// The upper half of a float.
struct bf16 {
    uint16_t bits;
};

inline f32x16 splat(float x) { return x - f32x16{}; }

inline f32x16 load(const float* from) {
    f32x16 x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline f32x16 load(const bf16* from) {
    u16x16 x;
    std::memcpy(&x, from, sizeof x);
    return (f32x16)(__builtin_convertvector(x, u32x16) << 16);
}

// Sixteen pairs of neighbours. (Copied into an array of vectors at once, they would go by way of memory.)
inline u32x16 load_pairs(const bf16* from) {
    u32x16 x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// Two neighbours.
inline uint32_t pair_at(const bf16* from) {
    uint32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return pair;
}

inline void store(float* to, f32x16 x) { std::memcpy(to, &x, sizeof x); }

// Rounds to the nearest, ties to even; a NaN stays one.
inline void store(bf16* to, f32x16 x) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &half, sizeof half);
#else
    u32x16 bits = (u32x16)x;
    u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    u32x16 is_nan = (u32x16)(x != x);
    u16x16 half = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), u16x16);
    std::memcpy(to, &half, sizeof half);
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

inline void narrow(float* to, float x) { *to = x; }
inline void narrow(bf16* to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to->bits = x == x ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : uint16_t(0x7fc0u);
}

inline f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }

// The sixteen added up, always in the same order: halves onto halves.
inline float sum_of(f32x16 x) {
    f32x8 halves[2];
    std::memcpy(halves, &x, sizeof halves);
    const f32x8 eight = halves[0] + halves[1];
    f32x4 quarters[2];
    std::memcpy(quarters, &eight, sizeof quarters);
    const f32x4 four = quarters[0] + quarters[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

inline float largest_of(f32x16 x) {
    f32x8 halves[2];
    std::memcpy(halves, &x, sizeof halves);
    const f32x8 eight = halves[0] > halves[1] ? halves[0] : halves[1];
    f32x4 quarters[2];
    std::memcpy(quarters, &eight, sizeof quarters);
    const f32x4 four = quarters[0] > quarters[1] ? quarters[0] : quarters[1];
    const float even = four[0] > four[2] ? four[0] : four[2], odd = four[1] > four[3] ? four[1] : four[3];
    return even > odd ? even : odd;
}

// e^x within 2 ulp, 0 below -87: x = n ln 2 + r, e^r by a polynomial, 2^n by adding n to the exponent.
inline f32x16 exp_of(f32x16 x) {
    const f32x16 lowest = splat(-87.0f), highest = splat(88.0f), shift = splat(12582912.0f);  // 1.5 * 2^23
    f32x16 clamped = x < lowest ? lowest : x;
    clamped = clamped > highest ? highest : clamped;
    f32x16 shifted = clamped * 1.44269504088896341f + shift;  // its low bits are now n
    f32x16 n = shifted - shift;
    f32x16 r = clamped - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    f32x16 y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    u32x16 exponent = ((u32x16)shifted - (u32x16)shift) << 23;  // of a NaN, any bits
    y = (f32x16)((u32x16)y + exponent);
    return x < lowest ? f32x16{} : y;
}

}  // namespace kitae
