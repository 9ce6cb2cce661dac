// What kitae/models/native.py calls, for float (kind 0) and bfloat16 (kind 1) tensors without gaps. Each returns 0, or
// OUT_OF_MEMORY (memory.h); results are then worthless.
#include "adamw.h"
#include "attention_backward.h"
#include "experts.h"
#include "gate.h"
#include "grouped.h"
#include "norm.h"
#include "rotary.h"
#include "softmax.h"

using kitae::bf16;

#define KITAE_FOR(kind, call)          \
    return kitae::status_of([&] {      \
        if (kind == 0) {               \
            using T = float;           \
            call;                      \
        } else {                       \
            using T = bf16;            \
            call;                      \
        }                              \
        return 0;                      \
    });
#define IN(name) static_cast<const T*>(name)
#define OUT(name) static_cast<T*>(name)

// Shapes of attention, and how far apart tokens and heads of q, k, v and the output's gradient are.
struct Attended {
    kitae::Heads heads;
    int64_t strides[4][2];

    template <class T> kitae::View<T> view(const void* data, int which) const {
        return {static_cast<const T*>(data), strides[which][0], strides[which][1]};
    }
    template <class T> kitae::Inputs<T> inputs(const void* q, const void* k, const void* v) const {
        return {view<T>(q, 0), view<T>(k, 1), view<T>(v, 2), heads};
    }
};

extern "C" {

int64_t kitae_rms_norm(
    int kind, const void* x, const void* weight, int64_t rows, int64_t size, float epsilon, void* y, float* factors) {
    KITAE_FOR(kind, kitae::rms_norm(IN(x), IN(weight), rows, size, epsilon, OUT(y), factors))
}

int64_t kitae_rms_norm_backward(
    int kind, const void* x, const void* weight, const float* factors, const void* dy, int64_t rows, int64_t size, void* dx,
    void* dweight) {
    KITAE_FOR(kind, kitae::rms_norm_backward(IN(x), IN(weight), factors, IN(dy), rows, size, OUT(dx), OUT(dweight)))
}

int64_t kitae_rotary(
    int kind, const void* x, const void* weight, const void* cosines, const void* sines, int64_t tokens, int64_t heads,
    int64_t size, float epsilon, void* y, float* factors) {
    KITAE_FOR(
        kind, kitae::rotary(IN(x), IN(weight), IN(cosines), IN(sines), tokens, heads, size, epsilon, OUT(y), factors))
}

int64_t kitae_rotary_backward(
    int kind, const void* x, const void* weight, const void* cosines, const void* sines, const float* factors,
    const void* dy, int64_t tokens, int64_t heads, int64_t size, void* dx, void* dweight) {
    KITAE_FOR(
        kind, kitae::rotary_backward(
                  IN(x), IN(weight), IN(cosines), IN(sines), factors, IN(dy), tokens, heads, size, OUT(dx), OUT(dweight)))
}

int64_t kitae_swiglu(int kind, const void* gate, const void* up, int64_t size, void* y) {
    KITAE_FOR(kind, kitae::swiglu(IN(gate), IN(up), size, OUT(y)))
}

int64_t kitae_swiglu_backward(
    int kind, const void* gate, const void* up, const void* dy, int64_t size, void* dgate, void* dup) {
    KITAE_FOR(kind, kitae::swiglu_backward(IN(gate), IN(up), IN(dy), size, OUT(dgate), OUT(dup)))
}

int64_t kitae_add(int kind, const void* x, int64_t size, float* sum) { KITAE_FOR(kind, kitae::add(IN(x), size, sum)) }

int64_t kitae_adamw(
    int kind, float* master, float* grad, float* mean, float* square, void* weight, int64_t size, const kitae::AdamW* how) {
    KITAE_FOR(kind, kitae::adamw(master, grad, mean, square, OUT(weight), size, *how))
}

int64_t kitae_grouped_product(
    int kind, const void* x, const int64_t* index, const int64_t* sizes, int64_t groups, const void* weights, int is_along,
    int64_t depth, int64_t columns, int adds, void* y) {
    KITAE_FOR(
        kind, kitae::grouped_product(
                  IN(x), index, sizes, groups, IN(weights), is_along != 0, depth, columns, adds != 0, OUT(y)))
}

int64_t kitae_grouped_outer(
    int kind, const void* y, const int64_t* y_index, const void* x, const int64_t* x_index, const int64_t* sizes,
    int64_t groups, int64_t rows, int64_t columns, float* sums) {
    KITAE_FOR(kind, kitae::grouped_outer(IN(y), y_index, IN(x), x_index, sizes, groups, rows, columns, sums))
}

int64_t kitae_gated(int kind, const void* h, int64_t slots, int64_t size, void* a) {
    KITAE_FOR(kind, kitae::gated(IN(h), slots, size, OUT(a)))
}

int64_t kitae_gated_backward(
    int kind, const void* h, const void* da, const float* weights, int64_t slots, int64_t size, void* dh, void* weighted,
    float* dweights) {
    KITAE_FOR(kind, kitae::gated_backward(IN(h), IN(da), weights, slots, size, OUT(dh), OUT(weighted), dweights))
}

int64_t kitae_sum_slots(
    int kind, const void* x, const int64_t* slots, const float* weights, int64_t tokens, int64_t each, int64_t size,
    void* out) {
    KITAE_FOR(kind, kitae::sum_slots(IN(x), slots, weights, tokens, each, size, OUT(out)))
}

int64_t kitae_target_logprobs(
    int kind, void* logits, const int64_t* targets, int64_t rows, int64_t vocabulary, float temperature, const float* scales,
    float* logprobs, float* lse, float* entropies) {
    KITAE_FOR(
        kind, kitae::target_logprobs(
                  OUT(logits), targets, rows, vocabulary, temperature, scales, logprobs, lse, entropies))
}

int64_t kitae_attend(
    int kind, const void* q, const void* k, const void* v, const Attended* shapes, const kitae::Segment* segments,
    int64_t num_segments, void* out, float* lse) {
    KITAE_FOR(kind, kitae::attend(shapes->inputs<T>(q, k, v), segments, num_segments, OUT(out), lse))
}

int64_t kitae_attend_backward(
    int kind, const void* q, const void* k, const void* v, const void* out, const float* lse, const void* dout,
    const Attended* shapes, const kitae::Segment* segments, const int64_t* groups, int64_t num_groups, void* dq, void* dk,
    void* dv) {
    KITAE_FOR(
        kind, kitae::attend_backward(
                  shapes->inputs<T>(q, k, v), {IN(out), lse, shapes->view<T>(dout, 3)}, segments, groups, num_groups, OUT(dq),
                  OUT(dk), OUT(dv)))
}
}
