// The decoder of Qwen2, Qwen3, Llama and DeepSeek, and the functions that Python calls.
//
//   tokens -> embedding -> [norm -> q, k, v -> pages -> attention -> + | norm -> gate, up -> down -> +] x layers
//          -> norm -> head -> logits -> sampler -> next tokens
//
// Latent attention (latent.h) takes the place of q, k, v and attention, routed experts (experts.h) that of gate, up and down,
// or add to them.
//
// A call is one parallel region of many phases (team.h). Prompts and single tokens go the same way: a pass is a number of
// tokens, each with its position and its row's pages.

#include "attention.h"
#include "experts.h"
#include "latent.h"
#include "model.h"
#include "norm.h"
#include "product.h"
#include "sampler.h"
#include "team.h"

namespace kitae {

// Phases of one pass, at most: of each layer, of the head, and what decode() adds.
inline int64_t phases_of(const Model& model) { return 28 * model.num_layers + 10; }

template <class T> void embed(const Team& team, const Model& model, const Scratch& scratch, const Tokens& tokens) {
    team.share(tokens.count, [&](Range mine) {
        for (int64_t t = mine.begin; t < mine.end; t++) {
            const T* from = static_cast<const T*>(model.embedding) + tokens.ids[t] * model.embedding_stride;
            float* to = scratch.hidden + t * scratch.hidden_stride;
            for (int64_t j = 0; j < model.hidden_size; j++) to[j] = to_float(from[j]);
            for (int64_t j = model.hidden_size; j < scratch.hidden_stride; j++) to[j] = 0;
        }
    });
}

// The first `count` rows of the residual stream, normalised.
template <class T>
void normalise_rows(const Team& team, const Model& model, const Scratch& scratch, const float* weights, int64_t count) {
    const int64_t stride = scratch.hidden_stride;
    team.share(count, [&](Range mine) {
        for (int64_t t = mine.begin; t < mine.end; t++)
            normalise(
                scratch.hidden + t * stride, weights, model.hidden_size, stride, model.norm_epsilon,
                static_cast<T*>(scratch.normed) + t * stride);
    });
}

// x * matrix added to the residual stream.
template <class T>
void add_product(const Team& team, const Scratch& scratch, const void* x, int64_t stride, int64_t count, const Matrix& matrix) {
    multiply(team, scratch, static_cast<const T*>(x), stride, count, matrix, [&](int64_t row, int64_t block, const float* sums) {
        float* to = scratch.hidden + row * scratch.hidden_stride + block * BLOCK;
        for (int j = 0; j < BLOCK; j += LANES) store(to + j, load(to + j) + load(sums + j));
    });
}

// silu(gate) * up, see Layer::gate_up.
template <class T>
void gate_up(const Team& team, const Scratch& scratch, int64_t count, const Matrix& matrix) {
    const T* x = static_cast<const T*>(scratch.normed);
    multiply(team, scratch, x, scratch.hidden_stride, count, matrix, [&](int64_t row, int64_t block, const float* sums) {
        store_gated(static_cast<T*>(scratch.activated) + row * scratch.activated_stride + block * BLOCK / 2, sums);
    });
}

template <class T>
void write_product(const Team& team, const Scratch& scratch, int64_t count, const Matrix& matrix, float* out, int64_t stride) {
    const T* x = static_cast<const T*>(scratch.normed);
    multiply(team, scratch, x, scratch.hidden_stride, count, matrix, [&](int64_t row, int64_t block, const float* sums) {
        std::memcpy(out + row * stride + block * BLOCK, sums, BLOCK * sizeof(float));
    });
}

// From the normalised rows to what attention gives, in scratch.attended.
template <class T>
void attend_to_keys(const Team& team, const Model& model, const Layer& layer, const Scratch& scratch, const Tokens& tokens) {
    write_product<T>(team, scratch, tokens.count, layer.qkv, scratch.qkv, scratch.qkv_stride);
    place_keys<T>(team, model, layer, scratch, tokens);
    attend<T>(team, model, layer, scratch, tokens);
}

// The same by way of latents.
template <class T>
void attend_with_latents(
    const Team& team, const Model& model, const Layer& layer, const Scratch& scratch, const Tokens& tokens) {
    const int64_t count = tokens.count;
    write_product<T>(team, scratch, count, layer.latent.down, scratch.qkv, scratch.qkv_stride);
    place_latents<T>(team, model, layer, scratch, tokens);
    const bool has_latent = layer.latent.query_norm;
    const void* x = has_latent ? scratch.query_latents : scratch.normed;
    const int64_t stride = has_latent ? scratch.query_latents_stride : scratch.hidden_stride;
    T* queries = static_cast<T*>(scratch.queries);
    const auto keep = [&](int64_t row, int64_t block, const float* sums) {
        store_columns(queries + row * scratch.queries_stride, scratch.queries_stride, block, sums);
    };
    multiply(team, scratch, static_cast<const T*>(x), stride, count, layer.latent.queries, keep);
    absorb_keys<T>(team, model, layer, scratch, tokens);
    attend_to_latents<T>(team, model, layer, scratch, tokens);
    raise_values<T>(team, model, layer, scratch, count);
}

// All layers: the tokens' residual stream is in scratch.hidden, their keys and values are in the pages.
template <class T> void run_layers(const Team& team, const Model& model, const Scratch& scratch, const Tokens& tokens) {
    const int64_t count = tokens.count;
    embed<T>(team, model, scratch, tokens);
    for (int64_t i = 0; i < model.num_layers; i++) {
        const Layer& layer = model.layers[i];
        normalise_rows<T>(team, model, scratch, layer.attention_norm, count);
        if (model.latent.latent)
            attend_with_latents<T>(team, model, layer, scratch, tokens);
        else
            attend_to_keys<T>(team, model, layer, scratch, tokens);
        add_product<T>(team, scratch, scratch.attended, scratch.attended_stride, count, layer.out);
        normalise_rows<T>(team, model, scratch, layer.mlp_norm, count);
        if (layer.gate_up.columns) {
            gate_up<T>(team, scratch, count, layer.gate_up);
            add_product<T>(team, scratch, scratch.activated, scratch.activated_stride, count, layer.down);
        }
        if (layer.experts.router) run_experts<T>(team, model, layer, scratch, count);
    }
}

// Logits of the first `count` rows of scratch.hidden, to scratch.logits from row `at` on.
template <class T> void run_head(const Team& team, const Model& model, const Scratch& scratch, int64_t count, int64_t at) {
    normalise_rows<T>(team, model, scratch, model.final_norm, count);
    float* out = scratch.logits + at * scratch.logits_stride;
    write_product<T>(team, scratch, count, model.head, out, scratch.logits_stride);
}

// The next token of a row, from its logits; `at` is where the result goes.
inline void sample(const Model& model, float* logits, const Sampling& sampling, int64_t row, int64_t at) {
    const Truncation truncation{sampling.top_ks[row], sampling.top_ps[row], sampling.log_min_ps[row]};
    const float temperature = sampling.temperatures[row];
    uint8_t* kept = sampling.kept ? sampling.kept + at * sampling.kept_stride : nullptr;
    const Choice choice =
        temperature > 0 && truncation.is_on()
            ? choose_among(logits, model.vocabulary, temperature, truncation, sampling.uniforms[at], kept)
            : choose(logits, model.vocabulary, temperature, sampling.uniforms[at]);
    sampling.ids[at] = choice.id;
    sampling.logprobs[at] = choice.logprob;
}

inline bool is_stop(const Sampling& sampling, int64_t id) {
    for (int64_t i = 0; i < sampling.num_stop_ids; i++)
        if (sampling.stop_ids[i] == id) return true;
    return false;
}

// Decode steps until one of them ended a row, at most sampling.steps; returns how many. Each row must have pages for all.
template <class T>
int64_t decode(const Model& model, const Scratch& scratch, const Tokens& tokens, const Sampling& sampling, int threads) {
    Course course(sampling.steps * phases_of(model));
    std::atomic<int64_t> done{0};
    std::atomic<bool> is_over{false};  // a thread that is behind may leave: all its phases are done
#pragma omp parallel num_threads(threads)
    {
        const Team team(threads, course);
        for (int64_t step = 0; !is_over && !course.memory.is_out(); step++) {
            run_layers<T>(team, model, scratch, tokens);
            run_head<T>(team, model, scratch, tokens.count, 0);
            team.share(tokens.count, [&](Range mine) {
                for (int64_t t = mine.begin; t < mine.end; t++) {
                    const int64_t at = step * tokens.count + t;
                    sample(model, scratch.logits + t * scratch.logits_stride, sampling, t, at);
                    tokens.ids[t] = sampling.ids[at];
                    tokens.positions[t]++;
                }
            });
            team.share(1, [&](Range) {
                done = step + 1;
                bool has_ended = done == sampling.steps;
                for (int64_t t = 0; t < tokens.count; t++) has_ended |= is_stop(sampling, tokens.ids[t]);
                if (has_ended) is_over = true;
            });
        }
    }
    course.memory.check();
    return done;
}

// One pass. The logits of tokens wanted[0, 1, ...] (rising) go to scratch.logits from row `at` on.
template <class T>
void forward(
    const Model& model, const Scratch& scratch, const Tokens& tokens, const int32_t* wanted, int64_t num_wanted, int64_t at,
    int threads) {
    Course course(phases_of(model));
#pragma omp parallel num_threads(threads)
    {
        const Team team(threads, course);
        run_layers<T>(team, model, scratch, tokens);
        team.share(1, [&](Range) {
            for (int64_t i = 0; i < num_wanted; i++)
                if (wanted[i] != i)
                    std::memcpy(
                        scratch.hidden + i * scratch.hidden_stride, scratch.hidden + wanted[i] * scratch.hidden_stride,
                        size_t(scratch.hidden_stride) * sizeof(float));
        });
        if (num_wanted) run_head<T>(team, model, scratch, num_wanted, at);
    }
    course.memory.check();
}

// Row i is sampled from row row_of[i] of the logits.
void sample_rows(
    const Model& model, const Scratch& scratch, const int32_t* row_of, int64_t count, const Sampling& sampling) {
    for (int64_t i = 0; i < count; i++)
        sample(model, scratch.logits + row_of[i] * scratch.logits_stride, sampling, i, i);
}

}  // namespace kitae

using namespace kitae;

// Each returns OUT_OF_MEMORY (memory.h) where there was too little; results are then worthless.
extern "C" {

// How many steps were done.
int64_t kitae_decode(
    const Model* model, const Scratch* scratch, const Tokens* tokens, const Sampling* sampling, int is_bf16, int threads) {
    return status_of([&] {
        return is_bf16 ? decode<bf16>(*model, *scratch, *tokens, *sampling, threads)
                       : decode<float>(*model, *scratch, *tokens, *sampling, threads);
    });
}

int64_t kitae_forward(
    const Model* model, const Scratch* scratch, const Tokens* tokens, const int32_t* wanted, int64_t num_wanted, int64_t at,
    int is_bf16, int threads) {
    return status_of([&] {
        if (is_bf16)
            forward<bf16>(*model, *scratch, *tokens, wanted, num_wanted, at, threads);
        else
            forward<float>(*model, *scratch, *tokens, wanted, num_wanted, at, threads);
        return 0;
    });
}

int64_t kitae_sample(
    const Model* model, const Scratch* scratch, const int32_t* row_of, int64_t count, const Sampling* sampling) {
    return status_of([&] {
        sample_rows(*model, *scratch, row_of, count, *sampling);
        return 0;
    });
}

}
