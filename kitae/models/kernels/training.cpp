// What kitae/models/native.py calls, for float (kind 0) and bfloat16 (kind 1) tensors without gaps.
#include "attention.h"
#include "gate.h"
#include "norm.h"
#include "rotary.h"
#include "softmax.h"

using kitae::bf16;

#define KITAE_FOR(kind, call)          \
    if (kind == 0) {                   \
        using T = float;               \
        call;                          \
    } else {                           \
        using T = bf16;                \
        call;                          \
    }
#define IN(name) static_cast<const T*>(name)
#define OUT(name) static_cast<T*>(name)

extern "C" {

void kitae_rms_norm(
    int kind, const void* x, const void* weight, int64_t rows, int64_t size, float epsilon, void* y, float* factors) {
    KITAE_FOR(kind, kitae::rms_norm(IN(x), IN(weight), rows, size, epsilon, OUT(y), factors))
}

void kitae_rms_norm_backward(
    int kind, const void* x, const void* weight, const float* factors, const void* dy, int64_t rows, int64_t size, void* dx,
    void* dweight) {
    KITAE_FOR(kind, kitae::rms_norm_backward(IN(x), IN(weight), factors, IN(dy), rows, size, OUT(dx), OUT(dweight)))
}

void kitae_rotary(
    int kind, const void* x, const void* weight, const void* cosines, const void* sines, int64_t tokens, int64_t heads,
    int64_t size, float epsilon, void* y, float* factors) {
    KITAE_FOR(
        kind, kitae::rotary(IN(x), IN(weight), IN(cosines), IN(sines), tokens, heads, size, epsilon, OUT(y), factors))
}

void kitae_rotary_backward(
    int kind, const void* x, const void* weight, const void* cosines, const void* sines, const float* factors,
    const void* dy, int64_t tokens, int64_t heads, int64_t size, void* dx, void* dweight) {
    KITAE_FOR(
        kind, kitae::rotary_backward(
                  IN(x), IN(weight), IN(cosines), IN(sines), factors, IN(dy), tokens, heads, size, OUT(dx), OUT(dweight)))
}

void kitae_swiglu(int kind, const void* gate, const void* up, int64_t size, void* y) {
    KITAE_FOR(kind, kitae::swiglu(IN(gate), IN(up), size, OUT(y)))
}

void kitae_swiglu_backward(
    int kind, const void* gate, const void* up, const void* dy, int64_t size, void* dgate, void* dup) {
    KITAE_FOR(kind, kitae::swiglu_backward(IN(gate), IN(up), IN(dy), size, OUT(dgate), OUT(dup)))
}

void kitae_add(int kind, const void* x, int64_t size, float* sum) { KITAE_FOR(kind, kitae::add(IN(x), size, sum)) }

void kitae_target_logprobs(
    int kind, void* logits, const int64_t* targets, int64_t rows, int64_t vocabulary, float temperature, const float* scales,
    float* logprobs, float* lse, float* entropies) {
    KITAE_FOR(
        kind, kitae::target_logprobs(
                  OUT(logits), targets, rows, vocabulary, temperature, scales, logprobs, lse, entropies))
}

void kitae_attend(
    int kind, const void* q, const void* k, const void* v, const kitae::Heads* heads, const kitae::Segment* segments,
    int64_t num_segments, void* out, float* lse) {
    KITAE_FOR(kind, kitae::attend(IN(q), IN(k), IN(v), *heads, segments, num_segments, OUT(out), lse))
}

void kitae_attend_backward(
    int kind, const void* q, const void* k, const void* v, const void* out, const float* lse, const void* dout,
    const kitae::Heads* heads, const kitae::Segment* segments, const int64_t* groups, int64_t num_groups, void* dq, float* dk,
    float* dv) {
    KITAE_FOR(
        kind, kitae::attend_backward(
                  IN(q), IN(k), IN(v), IN(out), lse, IN(dout), *heads, segments, groups, num_groups, OUT(dq), dk, dv))
}
}
