// Causal attention of packed rows, forward and backward, blockwise as in arXiv:2205.14135 (FlashAttention), in float32.
//
// A segment's tokens see the segment's prefix (a shared prompt) and the segment up to themselves. q is
// [tokens][heads][size], k [tokens][kv_heads][size], v [tokens][kv_heads][value_size], all without gaps. One thread takes
// one segment and key-value head at a time in the forward; in the backward all segments that share a prompt, in order, so
// that nobody else adds to the same keys: the bits do not depend on the threads.
#pragma once

#include <vector>

#include "multiply.h"

namespace kitae {

constexpr int64_t QUERIES = 32;  // rows of queries computed together

struct Segment {
    int64_t start, length, prefix_start, prefix_length;

    int64_t keys() const { return prefix_length + length; }
    int64_t token_of_key(int64_t key) const { return key < prefix_length ? prefix_start + key : start + key - prefix_length; }
};

struct Heads {
    int64_t queries, keys, size, value_size;
    float scaling;
};

inline int64_t whole_lanes(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

using Scratch = std::vector<float>;

// One head's rows of the keys' tokens, [keys][whole_lanes(size)], and transposed, [size][whole_lanes(keys)].
template <class T>
void gather(const T* from, int64_t heads, int64_t head, int64_t size, const Segment& segment, Scratch* rows, Scratch* columns) {
    const int64_t keys = segment.keys(), row_size = whole_lanes(size), column_size = whole_lanes(keys);
    if (rows) rows->assign(size_t(keys * row_size), 0.0f);
    if (columns) columns->assign(size_t(size * column_size), 0.0f);
    for (int64_t key = 0; key < keys; key++) {
        const T* own = from + (segment.token_of_key(key) * heads + head) * size;
        for (int64_t d = 0; rows && d < size; d++) (*rows)[size_t(key * row_size + d)] = value(own[d]);
        for (int64_t d = 0; columns && d < size; d++) (*columns)[size_t(d * column_size + key)] = value(own[d]);
    }
}

// `count` queries' rows of one head, [count][whole_lanes(size)], times `factor`.
template <class T>
void gather_queries(const T* from, int64_t heads, int64_t head, int64_t size, int64_t first, int64_t count, float factor, float* to) {
    const int64_t row_size = whole_lanes(size);
    for (int64_t r = 0; r < count; r++) {
        const T* own = from + ((first + r) * heads + head) * size;
        for (int64_t d = 0; d < size; d++) to[r * row_size + d] = value(own[d]) * factor;
        for (int64_t d = size; d < row_size; d++) to[r * row_size + d] = 0.0f;
    }
}

// scores[0 ... visible] become exp(score - shift), those up to `end` 0; returns their sum.
inline float exponentials(float* scores, int64_t visible, int64_t end, float shift) {
    f32x16 sums{};
    int64_t j = 0;
    for (; j + LANES <= visible; j += LANES) {
        const f32x16 e = exp_of(load(scores + j) - shift);
        sums += e;
        store(scores + j, e);
    }
    float tail[LANES] = {};
    for (int64_t i = j; i < visible; i++) tail[i - j] = scores[i] - shift;
    const f32x16 e = exp_of(load(tail));
    store(tail, e);
    float sum = sum_of(sums);
    for (int64_t i = j; i < visible; i++) sum += scores[i] = tail[i - j];
    for (int64_t i = visible; i < end; i++) scores[i] = 0.0f;
    return sum;
}

inline float largest(const float* scores, int64_t count) {
    float most = -INFINITY;
    int64_t j = 0;
    if (count >= LANES) {
        f32x16 found = load(scores);
        for (j = LANES; j + LANES <= count; j += LANES) found = larger(found, load(scores + j));
        most = largest_of(found);
    }
    for (; j < count; j++) most = scores[j] > most ? scores[j] : most;
    return most;
}

template <class T>
void attend_segment(const T* q, const T* k, const T* v, const Heads& heads, const Segment& segment, int64_t kv, T* out, float* lse) {
    Scratch keys, values;
    gather<T>(k, heads.keys, kv, heads.size, segment, nullptr, &keys);
    gather<T>(v, heads.keys, kv, heads.value_size, segment, &values, nullptr);
    const int64_t key_row = whole_lanes(segment.keys()), value_row = whole_lanes(heads.value_size);
    const int64_t query_row = whole_lanes(heads.size), shared = heads.queries / heads.keys;
    Scratch queries(size_t(QUERIES * query_row)), scores(size_t(QUERIES * key_row)), sums(size_t(QUERIES * value_row));
    for (int64_t head = kv * shared; head < (kv + 1) * shared; head++) {
        for (int64_t first = 0; first < segment.length; first += QUERIES) {
            const int64_t count = segment.length - first < QUERIES ? segment.length - first : QUERIES;
            const int64_t seen = segment.prefix_length + first + count, end = whole_lanes(seen);
            gather_queries(q, heads.queries, head, heads.size, segment.start + first, count, heads.scaling, queries.data());
            multiply({queries.data(), query_row, 1}, keys.data(), key_row, count, heads.size, end, scores.data(), key_row);
            float weight[QUERIES];
            for (int64_t r = 0; r < count; r++) {
                float* own = scores.data() + r * key_row;
                const int64_t visible = segment.prefix_length + first + r + 1;
                const float most = largest(own, visible), sum = exponentials(own, visible, end, most);
                weight[r] = 1.0f / sum;
                lse[(segment.start + first + r) * heads.queries + head] = most + std::log(sum);
            }
            multiply({scores.data(), key_row, 1}, values.data(), value_row, count, seen, value_row, sums.data(), value_row);
            for (int64_t r = 0; r < count; r++) {
                T* to = out + ((segment.start + first + r) * heads.queries + head) * heads.value_size;
                for (int64_t d = 0; d < heads.value_size; d++) narrow(to + d, sums[size_t(r * value_row + d)] * weight[r]);
            }
        }
    }
}

template <class T>
void attend(
    const T* q, const T* k, const T* v, const Heads& heads, const Segment* segments, int64_t num_segments, T* out, float* lse) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < num_segments * heads.keys; item++)
        attend_segment(q, k, v, heads, segments[item / heads.keys], item % heads.keys, out, lse);
}

// Adds a segment's share to dk and dv, which are float32, and writes dq.
template <class T>
void attend_segment_backward(
    const T* q, const T* k, const T* v, const T* out, const float* lse, const T* dout, const Heads& heads,
    const Segment& segment, int64_t kv, T* dq, float* dk, float* dv) {
    Scratch key_rows, keys, values;
    gather(k, heads.keys, kv, heads.size, segment, &key_rows, &keys);
    gather<T>(v, heads.keys, kv, heads.value_size, segment, nullptr, &values);
    const int64_t num_keys = segment.keys(), key_row = whole_lanes(num_keys), value_row = whole_lanes(heads.value_size);
    const int64_t query_row = whole_lanes(heads.size), shared = heads.queries / heads.keys;
    Scratch queries(size_t(QUERIES * query_row)), dqueries(size_t(QUERIES * query_row)), douts(size_t(QUERIES * value_row));
    Scratch scores(size_t(QUERIES * key_row)), dscores(size_t(QUERIES * key_row));
    Scratch dkeys(size_t(num_keys * query_row), 0.0f), dvalues(size_t(num_keys * value_row), 0.0f);
    for (int64_t head = kv * shared; head < (kv + 1) * shared; head++) {
        for (int64_t first = 0; first < segment.length; first += QUERIES) {
            const int64_t count = segment.length - first < QUERIES ? segment.length - first : QUERIES;
            const int64_t seen = segment.prefix_length + first + count, end = whole_lanes(seen), token = segment.start + first;
            gather_queries(q, heads.queries, head, heads.size, token, count, heads.scaling, queries.data());
            gather_queries(dout, heads.queries, head, heads.value_size, token, count, 1.0f, douts.data());
            multiply({queries.data(), query_row, 1}, keys.data(), key_row, count, heads.size, end, scores.data(), key_row);
            multiply({douts.data(), value_row, 1}, values.data(), key_row, count, heads.value_size, end, dscores.data(), key_row);
            for (int64_t r = 0; r < count; r++) {
                float *p = scores.data() + r * key_row, *dp = dscores.data() + r * key_row, delta = 0.0f;
                const int64_t number = (token + r) * heads.queries + head;
                exponentials(p, segment.prefix_length + first + r + 1, end, lse[number]);
                for (int64_t d = 0; d < heads.value_size; d++)
                    delta += douts[size_t(r * value_row + d)] * value(out[number * heads.value_size + d]);
                for (int64_t j = 0; j < end; j += LANES) store(dp + j, load(p + j) * (load(dp + j) - delta));
            }
            multiply({scores.data(), 1, key_row}, douts.data(), value_row, seen, count, value_row, dvalues.data(), value_row, true);
            multiply({dscores.data(), 1, key_row}, queries.data(), query_row, seen, count, query_row, dkeys.data(), query_row, true);
            multiply({dscores.data(), key_row, 1}, key_rows.data(), query_row, count, seen, query_row, dqueries.data(), query_row);
            for (int64_t r = 0; r < count; r++) {
                T* to = dq + ((token + r) * heads.queries + head) * heads.size;
                for (int64_t d = 0; d < heads.size; d++) narrow(to + d, dqueries[size_t(r * query_row + d)] * heads.scaling);
            }
        }
    }
    for (int64_t key = 0; key < num_keys; key++) {
        const int64_t number = segment.token_of_key(key) * heads.keys + kv;
        for (int64_t d = 0; d < heads.size; d++) dk[number * heads.size + d] += dkeys[size_t(key * query_row + d)];
        for (int64_t d = 0; d < heads.value_size; d++) dv[number * heads.value_size + d] += dvalues[size_t(key * value_row + d)];
    }
}

// Group g is the segments groups[g] ... groups[g + 1]: a prompt and what continues it. dk and dv come as zeros.
template <class T>
void attend_backward(
    const T* q, const T* k, const T* v, const T* out, const float* lse, const T* dout, const Heads& heads,
    const Segment* segments, const int64_t* groups, int64_t num_groups, T* dq, float* dk, float* dv) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < num_groups * heads.keys; item++) {
        const int64_t group = item / heads.keys;
        for (int64_t s = groups[group]; s < groups[group + 1]; s++)
            attend_segment_backward(q, k, v, out, lse, dout, heads, segments[s], item % heads.keys, dq, dk, dv);
    }
}

}  // namespace kitae
