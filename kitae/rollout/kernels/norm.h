// RMSNorm (arXiv:1910.07467) of one row in float32.
#pragma once

#include <cmath>

#include "vectors.h"

namespace kitae {

// 1 / sqrt(mean of squares + epsilon) of the first `size` of `padded` numbers; the rest is zero, 16 divides `padded`.
inline float inverse_rms(const float* x, int64_t size, int64_t padded, float epsilon) {
    f32x16 squares{};
    for (int64_t j = 0; j < padded; j += LANES) {
        const f32x16 part = load(x + j);
        squares += part * part;
    }
    return 1.0f / std::sqrt(sum_of(squares) / float(size) + epsilon);
}

// Where the weights are zero, as beyond `size`, so is the result.
template <class T>
void normalise(const float* x, const float* weights, int64_t size, int64_t padded, float epsilon, T* out) {
    const float factor = inverse_rms(x, size, padded, epsilon);
    for (int64_t j = 0; j < padded; j += LANES) store(out + j, load(x + j) * factor * load(weights + j));
}

}  // namespace kitae
