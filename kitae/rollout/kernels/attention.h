// Keys and values in pages, and attention of one token over them.
//
// Pages: [page][key head][ keys [head size / q][16][q] | values [16][head size] ], T. A page holds 16 tokens; q is 1 for float
// and 2 for bf16. Keys lie so that one load takes the same q dimensions of 16 tokens, values so that it takes 16 dimensions of
// one token.
#pragma once

#include <cmath>
#include <vector>

#include "model.h"
#include "norm.h"
#include "product.h"
#include "team.h"
#include "vectors.h"

namespace kitae {

constexpr int PAGE = 16;  // tokens
constexpr int AHEAD = 3;  // pages between the one whose keys are used and the one whose keys are fetched

// Normalise (Qwen3) and rotate one head of a query or key in place (arXiv:2104.09864, halves instead of pairs).
inline void prepare_head(float* head, const float* norm, const Model& model, int64_t position) {
    const int64_t size = model.head_size, half = size / 2;
    if (norm) normalise(head, norm, size, size, model.norm_epsilon, head);
    const float* cosine = model.cosines + position * half;
    const float* sine = model.sines + position * half;
    for (int64_t d = 0; d < half; d++) {
        const float a = head[d], b = head[half + d];
        head[d] = a * cosine[d] - b * sine[d];
        head[half + d] = b * cosine[d] + a * sine[d];
    }
}

// Prepare the queries of every token, and put its keys and values into its page.
template <class T>
void place_keys(const Team& team, const Model& model, const Layer& layer, const Scratch& scratch, const Tokens& tokens) {
    const int64_t size = model.head_size, heads = model.key_heads, shared = model.query_heads / heads;
    const auto place = [&](int64_t piece) {
        const int64_t token = piece / heads, head = piece % heads, position = tokens.positions[token];
        float* queries = scratch.qkv + token * scratch.qkv_stride + head * shared * size;
        float* key = scratch.qkv + token * scratch.qkv_stride + (model.query_heads + head) * size;
        const float* value = key + heads * size;
        for (int64_t r = 0; r < shared; r++) prepare_head(queries + r * size, layer.query_norm, model, position);
        prepare_head(key, layer.key_norm, model, position);
        const int32_t* table = tokens.tables + tokens.table_of[token] * tokens.table_stride;
        T* page = static_cast<T*>(layer.pages) + (table[position / PAGE] * heads + head) * 2 * PAGE * size;
        const int64_t row = position % PAGE;
        constexpr int64_t q = Packing<T>::q;
        for (int64_t d = 0; d < size; d++) narrow(page + (d / q * PAGE + row) * q + d % q, key[d]);
        T* values = page + PAGE * size + row * size;
        for (int64_t d = 0; d < size; d += LANES) store(values + d, load(value + d));
    };
    team.share(tokens.count * heads, [&](Range work) {
        for (int64_t piece = work.begin; piece < work.end; piece++) place(piece);
    });
}

// scores[r][16] of one page: QUERIES queries [QUERIES][size] times its keys. The keys of the `next` page and the values of
// this one are fetched meanwhile.
template <int QUERIES>
inline void score_page(
    const float* queries, int64_t size, const float* keys, const float* next, f32x16 (&scores)[QUERIES]) {
    f32x16 even[QUERIES] = {}, odd[QUERIES] = {};
    for (int64_t d = 0; d < size; d += 2) {
        __builtin_prefetch(next + d * PAGE, 0, 3);
        __builtin_prefetch(next + (d + 1) * PAGE, 0, 3);
        __builtin_prefetch(keys + (size + d) * PAGE, 0, 2);
        __builtin_prefetch(keys + (size + d + 1) * PAGE, 0, 2);
        const f32x16 first = load(keys + d * PAGE), second = load(keys + (d + 1) * PAGE);
#pragma GCC unroll 4
        for (int r = 0; r < QUERIES; r++) {
            even[r] += first * queries[r * size + d];
            odd[r] += second * queries[r * size + d + 1];
        }
    }
    for (int r = 0; r < QUERIES; r++) scores[r] = even[r] + odd[r];
}

template <int QUERIES>
inline void score_page(
    const bf16* queries, int64_t size, const bf16* keys, const bf16* next, f32x16 (&scores)[QUERIES]) {
    f32x16 even[QUERIES] = {}, odd[QUERIES] = {};
    for (int64_t d = 0; d < size; d += 4) {
        __builtin_prefetch(next + d * PAGE, 0, 3);
        __builtin_prefetch(next + (d + 2) * PAGE, 0, 3);
        __builtin_prefetch(keys + (size + d) * PAGE, 0, 2);
        __builtin_prefetch(keys + (size + d + 2) * PAGE, 0, 2);
        const u32x16 first = load_pairs(keys + d * PAGE), second = load_pairs(keys + (d + 2) * PAGE);
#pragma GCC unroll 4
        for (int r = 0; r < QUERIES; r++) {
            even[r] = add_pairs(even[r], pair_at(queries + r * size + d), first);
            odd[r] = add_pairs(odd[r], pair_at(queries + r * size + d + 2), second);
        }
    }
    for (int r = 0; r < QUERIES; r++) scores[r] = even[r] + odd[r];
}

// Make scores [QUERIES][length rounded up to pages] weights, whose sums are 1 when multiplied by inverse_total.
template <int QUERIES> void make_weights(float* scores, int64_t length, float (&inverse_total)[QUERIES]) {
    const int64_t width = (length + PAGE - 1) / PAGE * PAGE;
    for (int r = 0; r < QUERIES; r++) {
        float* own = scores + r * width;
        for (int64_t t = length; t < width; t++) own[t] = -INFINITY;  // nothing is there yet
        f32x16 most = load(own);
        for (int64_t t = LANES; t < width; t += LANES) most = larger(load(own + t), most);
        const float largest = largest_of(most);
        f32x16 total{};
        for (int64_t t = 0; t < width; t += LANES) {
            const f32x16 weight = exp_of(load(own + t) - largest);
            store(own + t, weight);
            total += weight;
        }
        inverse_total[r] = 1.0f / sum_of(total);
    }
}

// Sums of `size` numbers of each token, weighted by scores and inverse_total, to out [QUERIES][size]. `first` are the numbers
// of a page's first token, `row` lies between tokens and `stride` between pages. fetch(page, token) is called for each once.
template <int QUERIES, class T, class Fetch>
void mix_tokens(
    const float* scores, const float (&inverse_total)[QUERIES], const T* first, int64_t row, int64_t stride,
    const int32_t* table, int64_t length, int64_t size, T* out, Fetch fetch) {
    const int64_t num_pages = (length + PAGE - 1) / PAGE, width = num_pages * PAGE;
    // Four vectors of numbers at a time, so that QUERIES times four sums stay in registers.
    const auto mix = [&](int64_t from, auto count) {
        constexpr int VECTORS_HERE = decltype(count)::value;
        f32x16 sums[QUERIES][VECTORS_HERE] = {};
        for (int64_t p = 0; p < num_pages; p++) {
            const T* values = first + table[p] * stride + from;
            const char* next = reinterpret_cast<const char*>(first + table[p + 1 < num_pages ? p + 1 : p] * stride + from);
            const int64_t here = length - p * PAGE < PAGE ? length - p * PAGE : PAGE;
            for (int64_t t = 0; t < here; t++) {
                if (from == 0) fetch(p, t);
                for (int64_t line = 0; line < int64_t(VECTORS_HERE * LANES * sizeof(T)); line += 64)
                    __builtin_prefetch(next + t * row * int64_t(sizeof(T)) + line, 0, 3);
                f32x16 value[VECTORS_HERE];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS_HERE; v++) value[v] = load(values + t * row + v * LANES);
#pragma GCC unroll 4
                for (int r = 0; r < QUERIES; r++) {
                    const float weight = scores[r * width + p * PAGE + t];
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS_HERE; v++) sums[r][v] += value[v] * weight;
                }
            }
        }
        for (int r = 0; r < QUERIES; r++)
            for (int v = 0; v < VECTORS_HERE; v++) store(out + r * size + from + v * LANES, sums[r][v] * inverse_total[r]);
    };
    int64_t from = 0;
    for (; from + 4 * LANES <= size; from += 4 * LANES) mix(from, std::integral_constant<int, 4>{});
    for (; from < size; from += LANES) mix(from, std::integral_constant<int, 1>{});
}

// The pages of a token's row up to the token itself.
struct RowPages {
    const int32_t* table;
    int64_t length;

    RowPages(const Tokens& tokens, int64_t token)
        : table(tokens.tables + tokens.table_of[token] * tokens.table_stride), length(tokens.positions[token] + 1) {}
    int64_t count() const { return (length + PAGE - 1) / PAGE; }
};

// Attention of QUERIES query heads [QUERIES][size] that share one key head over the tokens of `row`, out [QUERIES][size].
// `pages` is the layer's first page of this key head, `stride` the elements from page to page; `scores` has room for
// QUERIES times the length, rounded up to pages. What `next` does not share with `row` is fetched meanwhile.
template <int QUERIES, class T>
void attend_to_pages(
    const T* queries, int64_t size, const RowPages& row, const RowPages& next, const T* pages, int64_t stride, float scale,
    float* scores, T* out) {
    const int32_t* table = row.table;
    const int64_t length = row.length;
    const int64_t num_pages = row.count(), width = num_pages * PAGE;
    for (int64_t p = 0; p < num_pages; p++) {
        const T* keys = pages + table[p] * stride;
        const T* later = pages + table[p + AHEAD < num_pages ? p + AHEAD : num_pages - 1] * stride;
        f32x16 here[QUERIES];
        score_page<QUERIES>(queries, size, keys, later, here);
        for (int r = 0; r < QUERIES; r++) store(scores + r * width + p * PAGE, here[r] * scale);
    }
    float inverse_total[QUERIES];
    make_weights(scores, length, inverse_total);
    // A sixteenth of next's page p. Always inlined: gcc drops calls of functions that do nothing but fetch.
    const auto fetch = [&](int64_t p, int64_t t) __attribute__((always_inline)) {
        if (p >= next.count() || next.table[p] == table[p]) return;
        const T* from = pages + next.table[p] * stride + t * 2 * size;
        for (int64_t d = 0; d < 2 * size; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + d, 0, 2);
    };
    mix_tokens(scores, inverse_total, pages + PAGE * size, size, stride, table, length, size, out, fetch);
}

// Attention of every token over all tokens of its row up to itself, whose keys and values are in their pages.
// Rows that share a prompt should be neighbours: its pages then come from the cache.
template <class T>
void attend(const Team& team, const Model& model, const Layer& layer, const Scratch& scratch, const Tokens& tokens) {
    const int64_t size = model.head_size, heads = model.key_heads, shared = model.query_heads / heads;
    const int64_t stride = heads * 2 * PAGE * size;
    const auto attend_one = [&](int64_t piece, bool is_last) {
        static thread_local std::vector<float> scores;
        static thread_local std::vector<T> queries;
        const int64_t head = piece / tokens.count, token = piece % tokens.count;
        const RowPages row(tokens, token), next(tokens, is_last || token + 1 == tokens.count ? token : token + 1);
        const float* rotated = scratch.qkv + token * scratch.qkv_stride + head * shared * size;
        queries.resize(size_t(shared * size));
        for (int64_t d = 0; d < shared * size; d += LANES) store(queries.data() + d, load(rotated + d));
        const T* pages = static_cast<const T*>(layer.pages) + head * 2 * PAGE * size;
        T* out = static_cast<T*>(scratch.attended) + token * scratch.attended_stride + head * shared * size;
        const size_t room = size_t(4 * row.count() * PAGE);
        if (scores.size() < room) scores.resize(room * 3 / 2);
        int64_t r = 0;
        const auto some = [&](auto count) {
            constexpr int QUERIES = decltype(count)::value;
            attend_to_pages<QUERIES>(
                queries.data() + r * size, size, row, next, pages, stride, model.attention_scale, scores.data(),
                out + r * size);
            r += QUERIES;
        };
        while (r + 4 <= shared) some(std::integral_constant<int, 4>{});
        if (shared - r == 3) some(std::integral_constant<int, 3>{});
        if (shared - r == 2) some(std::integral_constant<int, 2>{});
        if (shared - r == 1) some(std::integral_constant<int, 1>{});
    };
    team.share(heads * tokens.count, [&](Range work) {
        for (int64_t piece = work.begin; piece < work.end; piece++) attend_one(piece, piece + 1 == work.end);
    });
}

}  // namespace kitae
