// What Python hands over: plain structs of pointers, mirrored in kitae/rollout/structs.py.
//
// Strides count elements. T is the compute type: float, or bf16. Rows of intermediate results are padded to a multiple
// of 64 columns; the padding of what a matrix product reads is zero.
#pragma once

#include <cstdint>

namespace kitae {

// Weights of a linear layer, [blocks of 64 output columns][depth / q][64][q]: q is 1 for float and 2 for bf16, so that one
// 64-byte line holds what 16 columns multiply with the next q inputs. Output columns beyond the layer's own are zero. With
// scales, weights are 8-bit integers and q is 4, see int8.h.
struct Matrix {
    const void* weights;
    const float* bias;       // [columns], or null
    const float* scales;     // [columns]: what a column's integers are multiplied with; null where weights are T
    const int32_t* offsets;  // [columns]: 128 times the sum of a column's integers; null without scales
    int64_t columns;         // a multiple of 64
    int64_t depth;           // inputs, a multiple of q
};

// Latent attention of a layer, see latent.h.
struct Latent {
    Matrix down;              // of hidden: the queries' latent padded to 16 (or nothing), the latent, the keys' rotated part
    Matrix queries;           // of the queries' latent, or hidden where there is none: each head's plain, then rotated part
    Matrix key_up;            // head 0's, from the plain part of a query to the latent; the other heads' weights follow
    Matrix value_up;          // head 0's, from the latent to a value; the other heads' weights follow
    const float* query_norm;  // [queries' latent padded to 16], or null where there is none
    const float* norm;        // [latent]
};

// Routed experts of a layer, see experts.h.
struct Experts {
    const float* router;  // [experts][hidden stride]
    const float* bias;    // [experts], or null
    Matrix gate_up;       // expert 0's, as Layer::gate_up; the other experts' weights follow
    Matrix down;          // expert 0's; the other experts' weights follow
};

struct Layer {
    Matrix qkv;       // queries, then keys, then values, each head by head; nothing where attention is latent
    Latent latent;
    Matrix out;       // attention's output projection
    Matrix gate_up;   // of each block, 32 columns are gates and the next 32 the ups they belong to; may be nothing
    Matrix down;
    Experts experts;  // besides gate_up and down, which are then what all tokens share; without a router there are none
    const float* attention_norm;  // [hidden stride]
    const float* mlp_norm;        // [hidden stride]
    const float* query_norm;      // [head size], or null
    const float* key_norm;        // [head size], or null
    void* pages;                  // see Pages in attention.h, T
};

// Sizes of latent attention; `latent` is 0 in models that have another.
struct LatentSizes {
    int64_t query_latent, latent, rotated, plain, value;
    int64_t row;  // what is kept of a token: latent, rotated part and zeros up to a multiple of 32
    float norm_epsilon;
};

// How a token's experts are chosen.
struct Routing {
    int64_t num_experts, num_chosen;
    int64_t num_groups, num_open_groups;  // experts in equal groups, of which a token may use the best few
    int64_t best_of_group;                // a group's rank is the sum of so many of its best experts
    int is_sigmoid;                       // else softmax
    int is_normalised;                    // the shares of the chosen add up to 1, before they are scaled
    float scale;
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
    LatentSizes latent;
    Routing routing;
};

// Room for intermediate results; `rows` tokens fit.
struct Scratch {
    float* hidden;        // the residual stream
    void* normed;         // T
    float* qkv;           // [columns of qkv, or of latent attention's down]
    void* attended;       // [query heads x head size], T
    void* activated;      // [half the columns of gate_up], T
    float* logits;        // [vocabulary, padded]
    int64_t hidden_stride, qkv_stride, attended_stride, activated_stride, logits_stride;

    // Of latent attention; null without.
    void* query_latents;  // T
    void* queries;        // [columns of latent.queries], T
    void* absorbed;       // [heads x row of LatentSizes], T
    void* mixed;          // [heads x latent], T
    int64_t query_latents_stride, queries_stride, absorbed_stride, mixed_stride;

    // Of routed experts; null without. A token has a row for each expert it chose.
    float* shares;           // [tokens][chosen]
    int32_t* chosen;         // [tokens][chosen]
    int32_t* place;          // [tokens][chosen]: the row's place when they are sorted by expert
    int32_t* first_row;      // [experts + 1]: where an expert's rows begin
    void* expert_rows;       // [rows][hidden stride], T
    void* expert_activated;  // [rows][half the columns of experts.gate_up], T
    float* expert_out;       // [rows][hidden stride]
    int64_t expert_activated_stride;

    // Of 8-bit products; null without.
    uint8_t* integers;  // the rows of one product, as long as the longest there are
    float* row_scales;  // [rows]
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
    const double* uniforms;     // in [0, 1)
    const float* temperatures;  // [rows]; 0 takes the likeliest token
    int64_t* ids;
    float* logprobs;
    const int64_t* stop_ids;
    int64_t num_stop_ids;
    const int64_t* top_ks;     // [rows]; 0 is off
    const float* top_ps;       // [rows]; 1 is off
    const float* log_min_ps;   // [rows]; minus infinity is off
    uint8_t* kept;             // a bit per token that they left, kept_stride bytes of zeros at first; or null
    int64_t kept_stride;
};

}  // namespace kitae
