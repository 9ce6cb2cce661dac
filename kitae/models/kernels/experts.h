// Routed experts beside their matrix products: the gate, and the sum of a token's slots. See models/experts.py.
#pragma once

#include "gate.h"

namespace kitae {

// a = silu(gate) up of each slot, h being [slots][gate, then up].
template <class T> void gated(const T* h, int64_t slots, int64_t size, T* a) {
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < slots; s++) {
        const T *gate = h + 2 * s * size, *up = gate + size;
        for (int64_t j = 0; j < size; j += LANES) {
            const int64_t left = size - j;
            store_some(a + s * size + j, swiglu_of(load_some(gate + j, left), load_some(up + j, left)), left);
        }
    }
}

// What a slot adds to its token is weight (a W^T), and da the gradient of a W^T's inputs without the weight. Gives the
// gradient dh of h, the weighted a, and the weight's gradient a . da.
template <class T>
void gated_backward(
    const T* h, const T* da, const float* weights, int64_t slots, int64_t size, T* dh, T* weighted, float* dweights) {
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < slots; s++) {
        const T *gate = h + 2 * s * size, *up = gate + size;
        T *dgate = dh + 2 * s * size, *dup = dgate + size;
        f32x16 dots{};
        for (int64_t j = 0; j < size; j += LANES) {
            const int64_t left = size - j;
            const f32x16 g = load_some(gate + j, left), u = load_some(up + j, left), grad = load_some(da + s * size + j, left);
            const f32x16 share = sigmoid(g), act = g * share;
            dots += act * u * grad;
            store_some(weighted + s * size + j, act * u * weights[s], left);
            store_some(dgate + j, gate_gradient(weights[s] * grad * u, g, share), left);
            store_some(dup + j, weights[s] * grad * act, left);
        }
        dweights[s] = sum_of(dots);
    }
}

// out[t] = sum of weight x of the token's `each` slots, in order; weights [tokens][each], null where all are 1.
template <class T>
void sum_slots(
    const T* x, const int64_t* slots, const float* weights, int64_t tokens, int64_t each, int64_t size, T* out) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t j = 0; j < size; j += LANES) {
            f32x16 sum{};
            for (int64_t i = t * each; i < (t + 1) * each; i++)
                sum += load_some(x + slots[i] * size + j, size - j) * (weights ? weights[i] : 1.0f);
            store_some(out + t * size + j, sum, size - j);
        }
}

}  // namespace kitae
