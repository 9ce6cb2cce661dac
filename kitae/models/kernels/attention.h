// Causal attention of packed rows, forward and backward, in blocks of queries and keys as in arXiv:2205.14135 and
// arXiv:2307.08691 (FlashAttention). Products of bfloat16 numbers are added up in float32; the softmax is computed in
// float32, and its weights (in the backward, their gradients too) are rounded before the next product.
//
// A segment's tokens see the segment's prefix (a shared prompt) and the segment up to themselves. q is
// [tokens][heads][size], k [tokens][kv_heads][size], v [tokens][kv_heads][value_size], with gaps or without; what is
// written has none. One thread takes one segment and key-value head at a time in the forward; in the backward all segments
// that share a prompt, in order, so that nobody else adds to the same keys: the bits do not depend on the threads.
#pragma once

#include <algorithm>

#include "multiply.h"

namespace kitae {

constexpr int64_t QUERIES = 24, KEYS = 256;  // a block; what is kept of it fits into a core's cache
static_assert(KEYS % PANEL_ROWS == 0);

struct Segment {
    int64_t start, length, prefix_start, prefix_length;

    int64_t keys() const { return prefix_length + length; }
    int64_t token_of_key(int64_t key) const { return key < prefix_length ? prefix_start + key : start + key - prefix_length; }
};

struct Heads {
    int64_t queries, keys, size, value_size;
    float scaling;
};

template <class T> struct View {
    const T* data;
    int64_t token, head;  // how far apart neighbours are

    const T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

template <class T> struct Inputs {
    View<T> q, k, v;
    Heads heads;
};

// x, and 0 from lane `count` on.
inline f32x16 lanes_below(f32x16 x, int64_t count) {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lanes < int32_t(count) ? x : f32x16{};
}

// Scores of `count` queries with `keys` keys, which lie in panels; row r is only computed as far as its tile sees: its own
// query sees `visible` + r of the keys.
template <class C>
void visible_scores(
    const C* queries, const C* panels, int64_t depth, int64_t count, int64_t keys, int64_t visible, float* scores) {
    for (int64_t from = 0; from < keys; from += PANEL_ROWS)
        for (int64_t r = 0; r < count; r += TILE_ROWS) {
            const int64_t rows = std::min<int64_t>(TILE_ROWS, count - r);
            const int64_t seen = std::min({visible + r + rows - 1, keys, from + PANEL_ROWS}) - from;
            if (seen > 0)
                multiply(
                    Strided<C>{queries + r * depth, depth, 1}, panels + from * depth, PANEL_ROWS, rows, depth,
                    whole_lanes(seen), scores + r * KEYS + from, KEYS);
        }
}

// sums[r] += weights[r] b over the keys that row r's tile sees.
template <class T>
void add_visible(
    const Cell<T>* weights, const Cell<T>* b, int64_t columns, int64_t count, int64_t keys, int64_t visible, float* sums) {
    constexpr int64_t row = KEYS / PER_CELL<T>;
    for (int64_t r = 0; r < count; r += TILE_ROWS) {
        const int64_t rows = std::min<int64_t>(TILE_ROWS, count - r), seen = std::min(visible + r + rows - 1, keys);
        if (seen > 0)
            multiply(
                Strided<Cell<T>>{weights + r * row, row, 1}, b, columns, rows, cells<T>(seen), columns, sums + r * columns,
                columns, true);
    }
}

inline float largest(const float* scores, int64_t visible, float scaling) {
    float most = -INFINITY;
    int64_t j = 0;
    if (visible >= LANES) {
        f32x16 found = load(scores) * scaling;
        for (j = LANES; j + LANES <= visible; j += LANES) found = larger(found, load(scores + j) * scaling);
        most = largest_of(found);
    }
    for (; j < visible; j++) most = std::max(most, scores[j] * scaling);
    return most;
}

// weights = e^(scaling score - shift) of the visible scores, 0 up to `end`; returns their sum.
template <class T>
float exponentials(const float* scores, int64_t visible, int64_t end, float scaling, float shift, T* weights) {
    f32x16 sum{};
    for (int64_t j = 0; j < end; j += LANES) {
        f32x16 e{};
        if (j < visible) e = lanes_below(exp_of(load(scores + j) * scaling - shift), visible - j);
        store_row(weights + j, e);
        sum += e;
    }
    return sum_of(sum);
}

template <class T>
void attend_segment(const Inputs<T>& in, const Segment& segment, int64_t kv, T* out, float* lse) {
    const Heads& heads = in.heads;
    const int64_t num_keys = segment.keys(), depth = cells<T>(heads.size), value_row = whole_lanes(heads.value_size);
    const auto keys = buffer<Cell<T>>(whole_panels(num_keys) * depth), values = buffer<Cell<T>>(cells<T>(num_keys) * value_row);
    pack_panels<T>([&](int64_t i) { return in.k.at(segment.token_of_key(i), kv); }, num_keys, heads.size, keys.get());
    pack_pairs<T>([&](int64_t i) { return in.v.at(segment.token_of_key(i), kv); }, num_keys, heads.value_size, values.get());
    const auto queries = buffer<Cell<T>>(QUERIES * depth), weights = buffer<Cell<T>>(QUERIES * KEYS / PER_CELL<T>);
    const auto scores = buffer<float>(QUERIES * KEYS), sums = buffer<float>(QUERIES * value_row);
    const int64_t shared = heads.queries / heads.keys;
    for (int64_t head = kv * shared; head < (kv + 1) * shared; head++) {
        for (int64_t first = 0; first < segment.length; first += QUERIES) {
            const int64_t count = std::min(QUERIES, segment.length - first), token = segment.start + first;
            pack_rows<T>([&](int64_t r) { return in.q.at(token + r, head); }, count, heads.size, queries.get());
            float most[QUERIES], total[QUERIES] = {};
            std::fill(most, most + count, -INFINITY);
            std::fill(sums.get(), sums.get() + count * value_row, 0.0f);
            for (int64_t key = 0; key < segment.prefix_length + first + count; key += KEYS) {
                const int64_t visible = segment.prefix_length + first + 1 - key;  // of row 0
                const int64_t here = std::min(KEYS, visible + count - 1), end = whole_lanes(here);
                visible_scores(queries.get(), keys.get() + key * depth, depth, count, here, visible, scores.get());
                for (int64_t r = 0; r < count; r++) {
                    const float* own = scores.get() + r * KEYS;
                    const int64_t sees = std::min(visible + r, here);
                    const float before = most[r];
                    most[r] = std::max(before, largest(own, sees, heads.scaling));
                    T* to = reinterpret_cast<T*>(weights.get()) + r * KEYS;
                    const float sum = exponentials(own, sees, end, heads.scaling, most[r], to);
                    const float factor = std::exp(before - most[r]);
                    total[r] = total[r] * factor + sum;
                    for (int64_t d = 0; key && d < value_row; d += LANES) {
                        float* at = sums.get() + r * value_row + d;
                        store(at, load(at) * factor);
                    }
                }
                const Cell<T>* b = values.get() + key / PER_CELL<T> * value_row;
                add_visible<T>(weights.get(), b, value_row, count, here, visible, sums.get());
            }
            for (int64_t r = 0; r < count; r++) {
                const int64_t number = (token + r) * heads.queries + head;
                lse[number] = most[r] + std::log(total[r]);
                for (int64_t d = 0; d < heads.value_size; d += LANES)
                    store_some(
                        out + number * heads.value_size + d, load(sums.get() + r * value_row + d) * (1.0f / total[r]),
                        heads.value_size - d);
            }
        }
    }
}

template <class T>
void attend(const Inputs<T>& in, const Segment* segments, int64_t num_segments, T* out, float* lse) {
    Memory memory;
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < num_segments * in.heads.keys; item++)
        memory.run([&] { attend_segment(in, segments[item / in.heads.keys], item % in.heads.keys, out, lse); });
    memory.check();
}

}  // namespace kitae
