// Latent attention (MLA, arXiv:2405.04434, section 2.1): a token keeps one small vector, its latent, for all heads.
//
// A head's keys are key_up times the latent and a rotated part that all heads share. Since q (U c) = (q U) c, a query is
// multiplied with key_up instead, and meets the latents as they lie in the pages; what attention gives is a sum of latents,
// which value_up turns into a head's value.
//
//   hidden -> query latent -> norm -> queries -> key_up -> \                                    .
//   hidden -> latent -> norm, rotated part -> pages -------> attention over latents -> value_up -> out
//
// Pages: [page][ keys [(latent + rotated) / q][16][q] | latents [16][latent] ], T; see attention.h.
#pragma once

#include <vector>

#include "attention.h"
#include "groups.h"
#include "model.h"
#include "norm.h"
#include "product.h"
#include "team.h"
#include "vectors.h"

namespace kitae {

// The rotated part of one head, halves instead of pairs; `out` may be x.
template <class T> inline void rotate(const T* x, const Model& model, int64_t position, T* out) {
    const int64_t half = model.latent.rotated / 2;
    const float* cosine = model.cosines + position * half;
    const float* sine = model.sines + position * half;
    for (int64_t d = 0; d < half; d++) {
        const float a = to_float(x[d]), b = to_float(x[half + d]);
        narrow(out + d, a * cosine[d] - b * sine[d]);
        narrow(out + half + d, b * cosine[d] + a * sine[d]);
    }
}

// Normalise each token's latents, and put its own into its page.
template <class T>
void place_latents(const Team& team, const Model& model, const Layer& layer, const Scratch& scratch, const Tokens& tokens) {
    const LatentSizes& sizes = model.latent;
    const int64_t size = sizes.latent + sizes.rotated;
    team.share(tokens.count, [&](Range mine) {
        for (int64_t token = mine.begin; token < mine.end; token++) {
            const int64_t position = tokens.positions[token], row = position % PAGE;
            float* x = scratch.qkv + token * scratch.qkv_stride;
            if (layer.latent.query_norm) {
                T* to = static_cast<T*>(scratch.query_latents) + token * scratch.query_latents_stride;
                normalise(x, layer.latent.query_norm, sizes.query_latent, scratch.query_latents_stride, sizes.norm_epsilon, to);
                x += scratch.query_latents_stride;
            }
            normalise(x, layer.latent.norm, sizes.latent, sizes.latent, sizes.norm_epsilon, x);
            rotate(x + sizes.latent, model, position, x + sizes.latent);
            const int32_t* table = tokens.tables + tokens.table_of[token] * tokens.table_stride;
            T* page = static_cast<T*>(layer.pages) + table[position / PAGE] * PAGE * (size + sizes.latent);
            constexpr int64_t q = Packing<T>::q;
            for (int64_t d = 0; d < size; d++) narrow(page + (d / q * PAGE + row) * q + d % q, x[d]);
            T* latents = page + PAGE * size + row * sizes.latent;
            for (int64_t d = 0; d < sizes.latent; d += LANES) store(latents + d, load(x + d));
        }
    });
}

// 64 columns to where the first `width` of a row's columns are kept.
template <class T> inline void store_columns(T* row, int64_t width, int64_t block, const float* sums) {
    const int64_t from = block * BLOCK, here = width - from < BLOCK ? width - from : BLOCK;
    for (int64_t j = 0; j < here; j += LANES) store(row + from + j, load(sums + j));
}

// Each head's query in the space of the latents, and its rotated part.
template <class T>
void absorb_keys(const Team& team, const Model& model, const Layer& layer, const Scratch& scratch, const Tokens& tokens) {
    const LatentSizes& sizes = model.latent;
    const int64_t head_size = sizes.plain + sizes.rotated, size = sizes.latent + sizes.rotated;
    const T* queries = static_cast<const T*>(scratch.queries);
    multiply_groups<T>(
        team, layer.latent.key_up, model.query_heads, scratch.queries_stride,
        [&](int64_t head) { return Rows<T>{queries + head * head_size, tokens.count}; },
        [&](int64_t head, int64_t token, int64_t block, const float* sums) {
            T* to = static_cast<T*>(scratch.absorbed) + token * scratch.absorbed_stride + head * size;
            store_columns(to, sizes.latent, block, sums);
            const T* query = queries + token * scratch.queries_stride + head * head_size;
            if (block == 0) rotate(query + sizes.plain, model, tokens.positions[token], to + sizes.latent);
        });
}

// Attention of every token over the latents of its row up to its own; four heads share each load of a page.
template <class T>
void attend_to_latents(const Team& team, const Model& model, const Layer& layer, const Scratch& scratch, const Tokens& tokens) {
    const LatentSizes& sizes = model.latent;
    const int64_t size = sizes.latent + sizes.rotated, heads = model.query_heads, parts = (heads + 3) / 4;
    const auto attend_some = [&](int64_t token, int64_t head, auto count) {
        static thread_local std::vector<float> scores;
        constexpr int HEADS = decltype(count)::value;
        const int64_t length = tokens.positions[token] + 1;
        const size_t room = size_t(HEADS * ((length + PAGE - 1) / PAGE) * PAGE);
        if (scores.size() < room) scores.resize(room * 3 / 2);
        attend_to_pages<HEADS>(
            static_cast<const T*>(scratch.absorbed) + token * scratch.absorbed_stride + head * size, size, sizes.latent,
            length, static_cast<const T*>(layer.pages), PAGE * (size + sizes.latent),
            tokens.tables + tokens.table_of[token] * tokens.table_stride, model.attention_scale, scores.data(),
            static_cast<T*>(scratch.mixed) + token * scratch.mixed_stride + head * sizes.latent);
    };
    team.share(tokens.count * parts, [&](Range work) {
        for (int64_t piece = work.begin; piece < work.end; piece++) {
            const int64_t token = piece / parts, head = piece % parts * 4;
            if (heads - head >= 4) attend_some(token, head, std::integral_constant<int, 4>{});
            if (heads - head == 3) attend_some(token, head, std::integral_constant<int, 3>{});
            if (heads - head == 2) attend_some(token, head, std::integral_constant<int, 2>{});
            if (heads - head == 1) attend_some(token, head, std::integral_constant<int, 1>{});
        }
    });
}

// Each head's value of the latents it attended to.
template <class T>
void raise_values(const Team& team, const Model& model, const Layer& layer, const Scratch& scratch, int64_t count) {
    const LatentSizes& sizes = model.latent;
    const T* mixed = static_cast<const T*>(scratch.mixed);
    multiply_groups<T>(
        team, layer.latent.value_up, model.query_heads, scratch.mixed_stride,
        [&](int64_t head) { return Rows<T>{mixed + head * sizes.latent, count}; },
        [&](int64_t head, int64_t token, int64_t block, const float* sums) {
            T* to = static_cast<T*>(scratch.attended) + token * scratch.attended_stride + head * sizes.value;
            store_columns(to, sizes.value, block, sums);
        });
}

}  // namespace kitae
