// What Python hands over: plain structs of pointers, mirrored in kitae/rollout/structs.py.
//
// Strides count elements. T is the compute type: float, or bf16. Rows of intermediate results are padded to a multiple
// of 64 columns; the padding of what a matrix product reads is zero.
#pragma once

#include <cstdint>

namespace kitae {

// Weights of a linear layer, [blocks of 64 output columns][depth / q][64][q]: q is 1 for float and 2 for bf16, so that one
// 64-byte line holds what 16 columns multiply with the next q inputs. Output columns beyond the layer's own are zero.
struct Matrix {
    const void* weights;
    const float* bias;  // [columns], or null
    int64_t columns;    // a multiple of 64
    int64_t depth;      // inputs, a multiple of q
};

struct Layer {
    Matrix qkv;      // queries, then keys, then values, each head by head
    Matrix out;      // attention's output projection
    Matrix gate_up;  // of each block, 32 columns are gates and the next 32 the ups they belong to
    Matrix down;
    const float* attention_norm;  // [hidden stride]
    const float* mlp_norm;        // [hidden stride]
    const float* query_norm;      // [head size], or null
    const float* key_norm;        // [head size], or null
    void* pages;                  // see Pages in attention.h, T
};

struct Model {
    const Layer* layers;
    int64_t num_layers;
    Matrix head;
    const void* embedding;  // [vocabulary][embedding_stride], T
    int64_t embedding_stride;
    const float* final_norm;  // [hidden stride]
    const float* cosines;     // [positions][head size / 2]
    const float* sines;       // [positions][head size / 2]
    int64_t hidden_size, query_heads, key_heads, head_size, vocabulary;
    float norm_epsilon, attention_scale;
};

// Room for intermediate results; `rows` tokens fit.
struct Scratch {
    float* hidden;        // the residual stream
    void* normed;         // T
    float* qkv;           // [columns of qkv]
    void* attended;       // [query heads x head size], T
    void* activated;      // [half the columns of gate_up], T
    float* logits;        // [vocabulary, padded]
    int64_t hidden_stride, qkv_stride, attended_stride, activated_stride, logits_stride;
};

// The tokens of one forward pass. Token t's keys and values lie in the pages tables[table_of[t]][0, 1, ...].
struct Tokens {
    int64_t count;
    int64_t* ids;
    int32_t* positions;
    const int32_t* tables;
    int64_t table_stride;
    const int32_t* table_of;
};

// How the rows of a decode are sampled, and where the result goes; [steps][rows] each.
struct Sampling {
    int64_t steps;
    const double* uniforms;  // in [0, 1)
    float temperature;       // 0 takes the likeliest token
    int64_t* ids;
    float* logprobs;
    const int64_t* stop_ids;
    int64_t num_stop_ids;
};

}  // namespace kitae
