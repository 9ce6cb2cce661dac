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

inline f32x16 swiglu_of(f32x16 gate, f32x16 up) { return gate * sigmoid(gate) * up; }

// The gate's gradient, from that of silu(gate) and from sigmoid(gate).
inline f32x16 gate_gradient(f32x16 grad, f32x16 gate, f32x16 share) { return grad * share * (1.0f + gate * (1.0f - share)); }

template <class T> void swiglu(const T* gate, const T* up, int64_t size, T* y) {
    in_blocks(size, [=](int64_t j, int64_t left) {
        store_some(y + j, swiglu_of(load_some(gate + j, left), load_some(up + j, left)), left);
    });
}

template <class T> void swiglu_backward(const T* gate, const T* up, const T* dy, int64_t size, T* dgate, T* dup) {
    in_blocks(size, [=](int64_t j, int64_t left) {
        const f32x16 g = load_some(gate + j, left), u = load_some(up + j, left), grad = load_some(dy + j, left);
        const f32x16 s = sigmoid(g);
        store_some(dgate + j, gate_gradient(grad * u, g, s), left);
        store_some(dup + j, grad * g * s, left);
    });
}

// sum += x, in float32.
template <class T> void add(const T* x, int64_t size, float* sum) {
    in_blocks(size, [=](int64_t j, int64_t left) { store_some(sum + j, load_some(sum + j, left) + load_some(x + j, left), left); });
}

}  // namespace kitae
