// The heads of one projection: RMSNorm of each where the model has one (Qwen3), then rotary embedding (arXiv:2104.09864).
//
// x and y are [tokens][heads][size]; cosines and sines [tokens][size]. The first and second half of a head are rotated
// against each other, as transformers' rotate_half does it.
#pragma once

#include "norm.h"

namespace kitae {

constexpr int64_t LARGEST_HEAD = 1024;

template <class T>
void rotary(
    const T* x, const T* weight, const T* cosines, const T* sines, int64_t tokens, int64_t heads, int64_t size, float epsilon,
    T* y, float* factors) {
    const int64_t half = size / 2;
#pragma omp parallel for schedule(static)
    for (int64_t token = 0; token < tokens; token++) {
        const T *cosine = cosines + token * size, *sine = sines + token * size;
        for (int64_t head = 0; head < heads; head++) {
            const int64_t number = token * heads + head;
            const T* from = x + number * size;
            T* to = y + number * size;
            const float r = weight ? factors[number] = inverse_rms(from, size, epsilon) : 1.0f;
            for (int64_t j = 0; j < half; j += LANES) {
                const int64_t left = half - j;
                f32x16 a = load_some(from + j, left) * r, b = load_some(from + half + j, left) * r;
                if (weight) a *= load_some(weight + j, left), b *= load_some(weight + half + j, left);
                store_some(to + j, a * load_some(cosine + j, left) - b * load_some(sine + j, left), left);
                store_some(to + half + j, b * load_some(cosine + half + j, left) + a * load_some(sine + half + j, left), left);
            }
        }
    }
}

template <class T>
void rotary_backward(
    const T* x, const T* weight, const T* cosines, const T* sines, const float* factors, const T* dy, int64_t tokens,
    int64_t heads, int64_t size, T* dx, T* dweight) {
    const int64_t half = size / 2;
    std::vector<float> parts(dweight ? size_t(PARTS * size) : 0, 0.0f);
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < PARTS; part++) {
        float grad[LARGEST_HEAD];
        for (int64_t token = tokens * part / PARTS; token < tokens * (part + 1) / PARTS; token++) {
            const T *cosine = cosines + token * size, *sine = sines + token * size;
            for (int64_t head = 0; head < heads; head++) {
                const int64_t number = token * heads + head;
                const T* given = dy + number * size;
                for (int64_t j = 0; j < half; j += LANES) {
                    const int64_t left = half - j;
                    const f32x16 a = load_some(given + j, left), b = load_some(given + half + j, left);
                    store_some(grad + j, a * load_some(cosine + j, left) + b * load_some(sine + half + j, left), left);
                    store_some(
                        grad + half + j, b * load_some(cosine + half + j, left) - a * load_some(sine + j, left), left);
                }
                T* to = dx + number * size;
                if (weight)
                    rms_norm_row_backward(
                        x + number * size, weight, factors[number], grad, size, to,
                        dweight ? parts.data() + part * size : nullptr);
                else
                    for (int64_t j = 0; j < size; j += LANES) store_some(to + j, load_some(grad + j, size - j), size - j);
            }
        }
    }
    if (dweight) add_parts(parts, size, dweight);
}

}  // namespace kitae
