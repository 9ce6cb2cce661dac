// The searches for scales of kitae/export/blocks.py: the same candidates in the same order, sixteen parts at a time, one
// in each lane. A part's result depends on its own values only.
#include <cmath>

#include "../../rollout/kernels/vectors.h"

using namespace kitae;

// Value e of sixteen parts of SIZE; lanes beyond the last part are zero.
template <int SIZE>
static void turn(const float* x, int64_t parts, f32x16* turned) {
    for (int e = 0; e < SIZE; e++)
        for (int lane = 0; lane < LANES; lane++) turned[e][lane] = lane < parts ? x[lane * SIZE + e] : 0.0f;
}

static void put(f32x16 found, int64_t parts, float* to) {
    for (int lane = 0; lane < LANES && lane < parts; lane++) to[lane] = found[lane];
}

// To the nearest, ties to even. (Adding 1.5 * 2^23 would be fused with the product before, whose halves then move.)
static f32x16 nearest(f32x16 x) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    for (int lane = 0; lane < LANES; lane++) x[lane] = __builtin_rintf(x[lane]);
    return x;
#endif
}

static f32x16 between(f32x16 x, float low, float high) {
    x = x < splat(low) ? splat(low) : x;
    return x > splat(high) ? splat(high) : x;
}

static f32x16 magnitude(f32x16 x) { return x < f32x16{} ? -x : x; }

// Scales of parts of 16 whose values are -32 to 31 times them, errors weighted by x^2.
static f32x16 symmetric(const f32x16* x) {
    f32x16 largest = x[0];
    for (int e = 1; e < 16; e++) largest = magnitude(x[e]) > magnitude(largest) ? x[e] : largest;
    const i32x16 is_zero = magnitude(largest) < splat(1e-15f);
    largest = is_zero ? splat(1.0f) : largest;
    f32x16 best = {}, scale = {};
    for (int i = 0; i < 19; i++) {
        const int step = i < 10 ? (i ? i - 10 : 0) : i - 9;  // 0, -9 to -1, 1 to 9
        const f32x16 factor = splat((float)-(32 + 0.1 * step)) / largest;
        f32x16 along = {}, square = {};
        for (int e = 0; e < 16; e++) {
            const f32x16 q = between(nearest(x[e] * factor), -32.0f, 31.0f), weighted = x[e] * x[e] * q;
            along += weighted * x[e];
            square += weighted * q;
        }
        const f32x16 gain = square > f32x16{} ? along * along / square : f32x16{};  // by how much the error falls
        const i32x16 is_better = gain > best;
        best = is_better ? gain : best;
        scale = is_better ? along / square : scale;
    }
    return is_zero ? f32x16{} : scale;
}

static f32x16 error_of(const f32x16* x, const f32x16* weight, const f32x16* q, f32x16 scale, f32x16 offset) {
    f32x16 error = {};
    for (int e = 0; e < 32; e++) {
        const f32x16 off = scale * q[e] + offset - x[e];
        error += weight[e] * (off * off);
    }
    return error;
}

// (scale, offset) of parts of 32 with x = scale * (0 to levels) - offset, errors weighted by |x| + the part's rms.
static void with_offset(const f32x16* x, int levels, double first, int steps, f32x16* found) {
    f32x16 low = {}, high = x[0], squares = {};
    for (int e = 0; e < 32; e++) {
        low = x[e] < low ? x[e] : low;
        high = x[e] > high ? x[e] : high;
        squares += x[e] * x[e];
    }
    const i32x16 is_flat = high <= low;
    const f32x16 span = is_flat ? splat(1.0f) : high - low;
    f32x16 weight[32], q[32], rms, sum_w = {}, sum_x = {};
    for (int lane = 0; lane < LANES; lane++) rms[lane] = std::sqrt(squares[lane] / 32);
    for (int e = 0; e < 32; e++) {
        weight[e] = rms + magnitude(x[e]);
        sum_w += weight[e];
        sum_x += weight[e] * x[e];
        q[e] = nearest((x[e] - low) * (splat((float)levels) / span));
    }
    f32x16 scale = span / splat((float)levels), offset = low;
    f32x16 best = error_of(x, weight, q, scale, offset);
    for (int step = 0; step < steps; step++) {
        const f32x16 factor = splat((float)(levels + first + 0.1 * step)) / span;
        f32x16 sum_q = {}, sum_qq = {}, sum_xq = {};
        for (int e = 0; e < 32; e++) {
            q[e] = between(nearest((x[e] - low) * factor), 0.0f, (float)levels);
            const f32x16 weighted = weight[e] * q[e];
            sum_q += weighted;
            sum_qq += weighted * q[e];
            sum_xq += weighted * x[e];
        }
        const f32x16 determinant = sum_w * sum_qq - sum_q * sum_q;
        f32x16 new_scale = (sum_w * sum_xq - sum_x * sum_q) / determinant;
        f32x16 new_offset = (sum_qq * sum_x - sum_q * sum_xq) / determinant;
        const i32x16 is_above = new_offset > f32x16{};
        new_offset = is_above ? f32x16{} : new_offset;
        new_scale = is_above ? sum_xq / sum_qq : new_scale;
        const f32x16 error = error_of(x, weight, q, new_scale, new_offset);
        const i32x16 is_better = (error < best) & (determinant > f32x16{});
        best = is_better ? error : best;
        scale = is_better ? new_scale : scale;
        offset = is_better ? new_offset : offset;
    }
    found[0] = is_flat ? f32x16{} : scale;
    found[1] = -offset;
}

extern "C" {

// x [parts, 16] -> scale [parts]
void kitae_symmetric_scales(const float* x, int64_t parts, float* scale) {
    f32x16 turned[16];
    for (int64_t at = 0; at < parts; at += LANES) {
        turn<16>(x + at * 16, parts - at, turned);
        put(symmetric(turned), parts - at, scale + at);
    }
}

// x [parts, 32] -> scale [parts], offset [parts]
void kitae_scales_and_offsets(const float* x, int64_t parts, int levels, double first, int steps, float* scale,
                              float* offset) {
    f32x16 turned[32], found[2];
    for (int64_t at = 0; at < parts; at += LANES) {
        turn<32>(x + at * 32, parts - at, turned);
        with_offset(turned, levels, first, steps, found);
        put(found[0], parts - at, scale + at);
        put(found[1], parts - at, offset + at);
    }
}
}
