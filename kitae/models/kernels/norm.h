// RMSNorm (arXiv:1910.07467): y = x r w with r = 1 / sqrt(mean(x^2) + epsilon), rows of any number of features.
#pragma once

#include <vector>

#include "numbers.h"

namespace kitae {

template <class T> float inverse_rms(const T* x, int64_t size, float epsilon) {
    f32x16 squares{};
    for (int64_t j = 0; j < size; j += LANES) {
        const f32x16 part = load_some(x + j, size - j);
        squares += part * part;
    }
    return 1.0f / std::sqrt(sum_of(squares) / float(size) + epsilon);
}

template <class T>
void rms_norm(const T* x, const T* weight, int64_t rows, int64_t size, float epsilon, T* y, float* factors) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T* from = x + row * size;
        const float r = factors[row] = inverse_rms(from, size, epsilon);
        for (int64_t j = 0; j < size; j += LANES)
            store_some(y + row * size + j, load_some(from + j, size - j) * r * load_some(weight + j, size - j), size - j);
    }
}

// One row: with n = x r and g = dy w, dx = r (g - n mean(g n)); n dy is added to dweight, where there is one.
template <class T>
void rms_norm_row_backward(const T* x, const T* weight, float r, const float* dy, int64_t size, T* dx, float* dweight) {
    f32x16 dots{};
    for (int64_t j = 0; j < size; j += LANES)
        dots += load_some(dy + j, size - j) * load_some(weight + j, size - j) * load_some(x + j, size - j);
    const float mean = sum_of(dots) * r / float(size);
    for (int64_t j = 0; j < size; j += LANES) {
        const f32x16 grad = load_some(dy + j, size - j), n = load_some(x + j, size - j) * r;
        store_some(dx + j, r * (grad * load_some(weight + j, size - j) - n * mean), size - j);
        if (dweight) store_some(dweight + j, load_some(dweight + j, size - j) + n * grad, size - j);
    }
}

// Adds up parts [PARTS][size] in order.
template <class T> void add_parts(const std::vector<float>& parts, int64_t size, T* sum) {
    for (int64_t j = 0; j < size; j++) {
        float total = 0.0f;
        for (int64_t part = 0; part < PARTS; part++) total += parts[size_t(part * size + j)];
        narrow(sum + j, total);
    }
}

template <class T>
void rms_norm_backward(
    const T* x, const T* weight, const float* factors, const T* dy, int64_t rows, int64_t size, T* dx, T* dweight) {
    std::vector<float> parts(dweight ? size_t(PARTS * size) : 0, 0.0f);
    const auto grads = buffer<float>(PARTS * size);
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < PARTS; part++) {
        float* grad = grads.get() + part * size;
        for (int64_t row = rows * part / PARTS; row < rows * (part + 1) / PARTS; row++) {
            for (int64_t j = 0; j < size; j += LANES)
                store_some(grad + j, load_some(dy + row * size + j, size - j), size - j);
            rms_norm_row_backward(
                x + row * size, weight, factors[row], grad, size, dx + row * size,
                dweight ? parts.data() + part * size : nullptr);
        }
    }
    if (dweight) add_parts(parts, size, dweight);
}

}  // namespace kitae
