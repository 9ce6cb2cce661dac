// float and bfloat16 numbers as vectors of LANES; everything is computed in float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "../../rollout/kernels/memory.h"
#include "../../rollout/kernels/vectors.h"

namespace kitae {

// Sums that go across rows are taken over this many parts and then added in order, whatever the threads: same bits.
constexpr int64_t PARTS = 16;

// Memory that is not cleared.
template <class X> std::unique_ptr<X[]> buffer(int64_t size) { return std::unique_ptr<X[]>(new X[size_t(size)]); }

inline f32x16 sigmoid(f32x16 x) { return 1.0f / (1.0f + exp_of(-x)); }

// LANES numbers, or the `count` that are left: those go through a copy, padded with zeros.
template <class T> f32x16 load_some(const T* from, int64_t count) {
    if (count >= LANES) return load(from);
    T part[LANES] = {};
    std::memcpy(part, from, size_t(count) * sizeof(T));
    return load(part);
}

template <class T> void store_some(T* to, f32x16 x, int64_t count) {
    if (count >= LANES) return store(to, x);
    T part[LANES];
    store(part, x);
    std::memcpy(to, part, size_t(count) * sizeof(T));
}

}  // namespace kitae
