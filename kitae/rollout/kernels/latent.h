// Latent attention (MLA, arXiv:2405.04434, section 2.1): a token keeps one small vector, its latent, for all heads.
//
// A head's keys are key_up times the latent and a rotated part that all heads share. Since q (U c) = (q U) c, a query is
// multiplied with key_up instead, and meets the latents as they lie in the pages; what attention gives is a sum of latents,
// which value_up turns into a head's value.
//
//   queries: hidden -> query latent -> norm -> heads -> key_up
//   keys:    hidden -> latent -> norm, rotated part -> pages
//   attention over latents -> value_up -> out
//
// Pages: [page][16 tokens][row], T: a token's latent, its rotated part, and zeros up to a multiple of 32.
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
    team.share(tokens.count, [&](Range mine) {
        for (int64_t token = mine.begin; token < mine.end; token++) {
            const int64_t position = tokens.positions[token];
            float* x = scratch.qkv + token * scratch.qkv_stride;
            if (layer.latent.query_norm) {
                T* to = static_cast<T*>(scratch.query_latents) + token * scratch.query_latents_stride;
                normalise(x, layer.latent.query_norm, sizes.query_latent, scratch.query_latents_stride, sizes.norm_epsilon, to);
                x += scratch.query_latents_stride;
            }
            normalise(x, layer.latent.norm, sizes.latent, sizes.latent, sizes.norm_epsilon, x);
            rotate(x + sizes.latent, model, position, x + sizes.latent);
            const int32_t* table = tokens.tables + tokens.table_of[token] * tokens.table_stride;
            T* own = static_cast<T*>(layer.pages) + (table[position / PAGE] * PAGE + position % PAGE) * sizes.row;
            const int64_t size = sizes.latent + sizes.rotated;
            for (int64_t d = 0; d < sizes.row; d++) narrow(own + d, d < size ? x[d] : 0.0f);
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
    const int64_t head_size = sizes.plain + sizes.rotated;
    const T* queries = static_cast<const T*>(scratch.queries);
    multiply_groups(
        team, layer.latent.key_up, model.query_heads,
        [&](int64_t head) { return Rows<T>{queries + head * head_size, scratch.queries_stride, tokens.count, nullptr}; },
        [&](int64_t head, int64_t token, int64_t block, const float* sums) {
            T* to = static_cast<T*>(scratch.absorbed) + token * scratch.absorbed_stride + head * sizes.row;
            store_columns(to, sizes.latent, block, sums);
            if (block != 0) return;
            const T* query = queries + token * scratch.queries_stride + head * head_size;
            rotate(query + sizes.plain, model, tokens.positions[token], to + sizes.latent);
            for (int64_t d = sizes.latent + sizes.rotated; d < sizes.row; d++) narrow(to + d, 0.0f);
        });
}

// A cache line of a token: 16 numbers, or 16 pairs of bf16.
inline f32x16 load_line(const float* from) { return load(from); }
inline u32x16 load_line(const bf16* from) { return load_pairs(from); }

// sums + the products of two lines, lane by lane.
inline f32x16 add_line(f32x16 sums, f32x16 a, f32x16 b) { return sums + a * b; }
inline f32x16 add_line(f32x16 sums, u32x16 a, u32x16 b) {
#if defined(__AVX512BF16__)
    return (f32x16)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += (f32x16)(a << 16) * (f32x16)(b << 16);
    return sums + (f32x16)(a & 0xffff0000u) * (f32x16)(b & 0xffff0000u);
#endif
}

// Each of the sixteen vectors added up, in a lane of its own.
inline f32x16 sums_of(const f32x16 (&x)[LANES]) {
#if defined(__AVX512F__)
    __m512 pairs[8], fours[4], eights[2];
    for (int i = 0; i < 8; i++) {
        const __m512 a = (__m512)x[2 * i], b = (__m512)x[2 * i + 1];
        pairs[i] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 4; i++) {
        const __m512d a = (__m512d)pairs[2 * i], b = (__m512d)pairs[2 * i + 1];
        fours[i] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
    }
    const auto halves = [](__m512 a, __m512 b) { return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd); };
    for (int i = 0; i < 2; i++) eights[i] = halves(fours[2 * i], fours[2 * i + 1]);
    return (f32x16)halves(eights[0], eights[1]);
#else
    f32x16 sums;
    for (int i = 0; i < LANES; i++) sums[i] = sum_of(x[i]);
    return sums;
#endif
}

// Scores [HEADS][width] of one page's tokens: HEADS queries [HEADS][row] times their rows, four tokens at a time. The `next`
// page is fetched meanwhile.
template <int HEADS, class T>
void score_latents(const T* queries, int64_t row, const T* page, const T* next, float scale, float* scores, int64_t width) {
    constexpr int TOKENS = 4;
    for (int t = 0; t < PAGE; t += TOKENS) {
        f32x16 sums[LANES] = {};
        for (int64_t d = 0; d < row; d += int64_t(64 / sizeof(T))) {
            decltype(load_line(page)) token[TOKENS];
#pragma GCC unroll 4
            for (int i = 0; i < TOKENS; i++) {
                token[i] = load_line(page + (t + i) * row + d);
                __builtin_prefetch(next + (t + i) * row + d, 0, 3);
            }
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) {
                const auto query = load_line(queries + h * row + d);
#pragma GCC unroll 4
                for (int i = 0; i < TOKENS; i++) sums[h * TOKENS + i] = add_line(sums[h * TOKENS + i], query, token[i]);
            }
        }
        float here[LANES];
        store(here, sums_of(sums) * scale);
        for (int h = 0; h < HEADS; h++) std::memcpy(scores + h * width + t, here + h * TOKENS, TOKENS * sizeof(float));
    }
}

// Attention of HEADS heads [HEADS][row] over `length` tokens, out [HEADS][latent]; see attend_to_pages.
template <int HEADS, class T>
void attend_to_rows(
    const T* queries, const LatentSizes& sizes, int64_t length, const T* pages, const int32_t* table, float scale, T* out) {
    static thread_local std::vector<float> scores;
    const int64_t num_pages = (length + PAGE - 1) / PAGE, width = num_pages * PAGE, stride = PAGE * sizes.row;
    if (int64_t(scores.size()) < HEADS * width) scores.resize(size_t(HEADS * width * 3 / 2));
    for (int64_t p = 0; p < num_pages; p++) {
        const T* next = pages + table[p + 1 < num_pages ? p + 1 : p] * stride;
        score_latents<HEADS>(
            queries, sizes.row, pages + table[p] * stride, next, scale, scores.data() + p * PAGE, width);
    }
    float inverse_total[HEADS];
    make_weights(scores.data(), length, inverse_total);
    const auto nothing = [](int64_t, int64_t) {};  // a row's pages serve all its heads: they come from the cache
    mix_tokens(scores.data(), inverse_total, pages, sizes.row, stride, table, length, sizes.latent, out, nothing);
}

// Attention of every token over the latents of its row up to its own; four heads share each load of a page.
template <class T>
void attend_to_latents(const Team& team, const Model& model, const Layer& layer, const Scratch& scratch, const Tokens& tokens) {
    const LatentSizes& sizes = model.latent;
    const int64_t heads = model.query_heads, parts = (heads + 3) / 4;
    const auto attend_some = [&](int64_t token, int64_t head, auto count) {
        attend_to_rows<decltype(count)::value>(
            static_cast<const T*>(scratch.absorbed) + token * scratch.absorbed_stride + head * sizes.row, sizes,
            tokens.positions[token] + 1, static_cast<const T*>(layer.pages),
            tokens.tables + tokens.table_of[token] * tokens.table_stride, model.attention_scale,
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
    multiply_groups(
        team, layer.latent.value_up, model.query_heads,
        [&](int64_t head) { return Rows<T>{mixed + head * sizes.latent, scratch.mixed_stride, count, nullptr}; },
        [&](int64_t head, int64_t token, int64_t block, const float* sums) {
            T* to = static_cast<T*>(scratch.attended) + token * scratch.attended_stride + head * sizes.value;
            store_columns(to, sizes.value, block, sums);
        });
}

}  // namespace kitae
