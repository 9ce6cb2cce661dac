// SwiGLU (arXiv:2002.05202): y = silu(gate) up, with silu(g) = g sigmoid(g).
#pragma once

#include "numbers.h"

namespace kitae {

constexpr int64_t BLOCK_SIZE = 4096;  // numbers a thread takes at a time

template <class Work> void in_blocks(int64_t size, Work work) {
    const int64_t blocks = (size + BLOCK_SIZE - 1) / BLOCK_SIZE;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t end = block + 1 == blocks ? size : (block + 1) * BLOCK_SIZE;
        for (int64_t j = block * BLOCK_SIZE; j < end; j += LANES) work(j, end - j);
    }
}

template <class T> void swiglu(const T* gate, const T* up, int64_t size, T* y) {
    in_blocks(size, [=](int64_t j, int64_t left) {
        const f32x16 g = load_some(gate + j, left);
        store_some(y + j, g * sigmoid(g) * load_some(up + j, left), left);
    });
}

template <class T> void swiglu_backward(const T* gate, const T* up, const T* dy, int64_t size, T* dgate, T* dup) {
    in_blocks(size, [=](int64_t j, int64_t left) {
        const f32x16 g = load_some(gate + j, left), u = load_some(up + j, left), grad = load_some(dy + j, left);
        const f32x16 s = sigmoid(g);
        store_some(dgate + j, grad * u * s * (1.0f + g * (1.0f - s)), left);
        store_some(dup + j, grad * g * s, left);
    });
}

// sum += x, in float32.
template <class T> void add(const T* x, int64_t size, float* sum) {
    in_blocks(size, [=](int64_t j, int64_t left) { store_some(sum + j, load_some(sum + j, left) + load_some(x + j, left), left); });
}

}  // namespace kitae
