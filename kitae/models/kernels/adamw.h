// AdamW (arXiv:1711.05101, algorithm 2) in one pass over memory: gradient scaled, moments, float32 master, the weight in the
// model's precision, and the gradient cleared for the next step.
#pragma once

#include "gate.h"

namespace kitae {

struct AdamW {
    float scale, decay, beta1, beta2, step_size, root_correction, epsilon;
    // decay: 1 - rate x weight decay; step_size: rate / (1 - beta1^t); root_correction: sqrt(1 - beta2^t)
};

inline f32x16 root_of(f32x16 x) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_sqrt_ps((__m512)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

// `weight` may be missing: the master is the weight itself.
template <class T>
void adamw(float* master, float* grad, float* mean, float* square, T* weight, int64_t size, const AdamW& how) {
    in_blocks(size, [=](int64_t j, int64_t left) {
        const f32x16 g = load_some(grad + j, left) * how.scale;
        f32x16 m = load_some(mean + j, left), v = load_some(square + j, left) * how.beta2, p = load_some(master + j, left) * how.decay;
        m += (g - m) * (1.0f - how.beta1);
        v += g * g * (1.0f - how.beta2);
        p -= m * how.step_size / (root_of(v) / how.root_correction + how.epsilon);
        store_some(mean + j, m, left);
        store_some(square + j, v, left);
        store_some(master + j, p, left);
        store_some(grad + j, f32x16{}, left);
        if (weight) store_some(weight + j, p, left);
    });
}

}  // namespace kitae
