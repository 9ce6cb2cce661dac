// The backward of attention.h: weights are computed again, block by block. With weights P and output O,
// dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta) scaling with delta = sum(dO O),  dQ = dS K,  dK = dS^T Q.
#pragma once

#include <vector>

#include "attention.h"

namespace kitae {

template <class T> struct Outputs {
    const T* out;  // what the forward gave
    const float* lse;
    View<T> dout;
};

// delta of each of the segment's queries in one head.
template <class T> void output_dots(const Outputs<T>& given, const Heads& heads, const Segment& segment, int64_t head, float* delta) {
    for (int64_t i = 0; i < segment.length; i++) {
        const T* own = given.out + ((segment.start + i) * heads.queries + head) * heads.value_size;
        const T* grad = given.dout.at(segment.start + i, head);
        f32x16 dots{};
        for (int64_t d = 0; d < heads.value_size; d += LANES)
            dots += load_some(own + d, heads.value_size - d) * load_some(grad + d, heads.value_size - d);
        delta[i] = sum_of(dots);
    }
}

// A block's weights and the gradients of its scores. Both by key, [pair of queries][KEYS]; the latter in rows too.
template <class T> struct Block {
    std::unique_ptr<float[]> scores = buffer<float>(QUERIES * KEYS), dweights = buffer<float>(QUERIES * KEYS);
    std::unique_ptr<Cell<T>[]> weights = buffer<Cell<T>>(QUERIES * KEYS / PER_CELL<T>);
    std::unique_ptr<Cell<T>[]> dscores = buffer<Cell<T>>(QUERIES * KEYS / PER_CELL<T>);
    std::unique_ptr<Cell<T>[]> dscore_rows = buffer<Cell<T>>(QUERIES * KEYS / PER_CELL<T>);

    // From scores and dweights, with lse and delta of each of `count` queries; query r sees `visible` + r keys.
    void differentiate(int64_t count, int64_t keys, int64_t visible, float scaling, const float* lse, int64_t lse_step, const float* delta) {
        for (int64_t r = 0; r < count; r += PER_CELL<T>)
            for (int64_t j = 0; j < keys; j += LANES) {
                f32x16 p[PER_CELL<T>] = {}, dp[PER_CELL<T>] = {};
                for (int64_t i = 0; i < PER_CELL<T> && r + i < count; i++) {
                    const int64_t row = r + i, left = visible + row - j;
                    if (left > 0) {
                        const f32x16 e = exp_of(load(scores.get() + row * KEYS + j) * scaling - lse[row * lse_step]);
                        p[i] = lanes_below(e, left);
                        dp[i] = lanes_below(e * (load(dweights.get() + row * KEYS + j) - delta[row]) * scaling, left);
                    }
                    store_row(reinterpret_cast<T*>(dscore_rows.get()) + row * KEYS + j, dp[i]);
                }
                store_cells(weights.get() + r / PER_CELL<T> * KEYS + j, p);
                store_cells(dscores.get() + r / PER_CELL<T> * KEYS + j, dp);
            }
    }
};

// Writes dq, and adds to dkeys [keys][whole_lanes(size)] and dvalues [keys][whole_lanes(value_size)].
template <class T>
void attend_segment_backward(
    const Inputs<T>& in, const Outputs<T>& given, const Segment& segment, int64_t kv, T* dq, float* dkeys, float* dvalues) {
    const Heads& heads = in.heads;
    const int64_t num_keys = segment.keys(), depth = cells<T>(heads.size), value_depth = cells<T>(heads.value_size);
    const int64_t key_row = whole_lanes(heads.size), value_row = whole_lanes(heads.value_size);
    const auto key_at = [&](int64_t i) { return in.k.at(segment.token_of_key(i), kv); };
    const auto key_panels = buffer<Cell<T>>(whole_panels(num_keys) * depth), keys = buffer<Cell<T>>(cells<T>(num_keys) * key_row);
    const auto values = buffer<Cell<T>>(whole_panels(num_keys) * value_depth);
    pack_panels<T>(key_at, num_keys, heads.size, key_panels.get());
    pack_pairs<T>(key_at, num_keys, heads.size, keys.get());
    pack_panels<T>([&](int64_t i) { return in.v.at(segment.token_of_key(i), kv); }, num_keys, heads.value_size, values.get());
    const auto queries = buffer<Cell<T>>(QUERIES * depth), query_pairs = buffer<Cell<T>>(cells<T>(QUERIES) * key_row);
    const auto douts = buffer<Cell<T>>(QUERIES * value_depth), dout_pairs = buffer<Cell<T>>(cells<T>(QUERIES) * value_row);
    const auto delta = buffer<float>(segment.length), dqueries = buffer<float>(segment.length * key_row);
    Block<T> block;
    const int64_t shared = heads.queries / heads.keys;
    for (int64_t head = kv * shared; head < (kv + 1) * shared; head++) {
        output_dots(given, heads, segment, head, delta.get());
        std::fill(dqueries.get(), dqueries.get() + segment.length * key_row, 0.0f);
        for (int64_t key = 0; key < num_keys; key += KEYS) {
            const int64_t sees_it = std::max<int64_t>(0, key - segment.prefix_length);  // the first query that sees this key
            for (int64_t first = sees_it / QUERIES * QUERIES; first < segment.length; first += QUERIES) {
                const int64_t count = std::min(QUERIES, segment.length - first), token = segment.start + first;
                const int64_t visible = segment.prefix_length + first + 1 - key;  // of row 0
                const int64_t here = std::min(KEYS, visible + count - 1);
                const auto query_at = [&](int64_t r) { return in.q.at(token + r, head); };
                const auto dout_at = [&](int64_t r) { return given.dout.at(token + r, head); };
                pack_rows<T>(query_at, count, heads.size, queries.get());
                pack_pairs<T>(query_at, count, heads.size, query_pairs.get());
                pack_rows<T>(dout_at, count, heads.value_size, douts.get());
                pack_pairs<T>(dout_at, count, heads.value_size, dout_pairs.get());
                visible_scores(queries.get(), key_panels.get() + key * depth, depth, count, here, visible, block.scores.get());
                visible_scores(
                    douts.get(), values.get() + key * value_depth, value_depth, count, here, visible, block.dweights.get());
                block.differentiate(
                    count, here, visible, heads.scaling, given.lse + token * heads.queries + head, heads.queries,
                    delta.get() + first);
                multiply(
                    Strided<Cell<T>>{block.weights.get(), 1, KEYS}, dout_pairs.get(), value_row, here, cells<T>(count),
                    value_row, dvalues + key * value_row, value_row, true);
                multiply(
                    Strided<Cell<T>>{block.dscores.get(), 1, KEYS}, query_pairs.get(), key_row, here, cells<T>(count), key_row,
                    dkeys + key * key_row, key_row, true);
                add_visible<T>(
                    block.dscore_rows.get(), keys.get() + key / PER_CELL<T> * key_row, key_row, count, here, visible,
                    dqueries.get() + first * key_row);
            }
        }
        for (int64_t i = 0; i < segment.length; i++)
            for (int64_t d = 0; d < heads.size; d += LANES)
                store_some(
                    dq + ((segment.start + i) * heads.queries + head) * heads.size + d, load(dqueries.get() + i * key_row + d),
                    heads.size - d);
    }
}

// One tensor's gradients of the keys of one group and head: those of the prompt, which several segments see, are added up.
template <class T> struct KeyGradients {
    T* to;
    int64_t heads, head, size, row;
    std::unique_ptr<float[]> segment;
    std::vector<float> prompt;

    KeyGradients(T* to, int64_t heads, int64_t head, int64_t size, int64_t most_keys, int64_t prompt_keys)
        : to(to), heads(heads), head(head), size(size), row(whole_lanes(size)), segment(buffer<float>(most_keys * row)),
          prompt(size_t(prompt_keys * row), 0.0f) {}

    float* cleared(const Segment& own) {
        std::fill(segment.get(), segment.get() + own.keys() * row, 0.0f);
        return segment.get();
    }
    void write(int64_t token, const float* from) const {
        for (int64_t d = 0; d < size; d += LANES) store_some(to + (token * heads + head) * size + d, load(from + d), size - d);
    }
    // The segment's are complete: its own are written, its prompt's (or, if it is the prompt, all) kept for write_prompt.
    void take(const Segment& own) {
        const int64_t kept = own.prefix_length || prompt.empty() ? own.prefix_length : own.length;
        for (int64_t j = 0; j < kept * row; j += LANES) store(prompt.data() + j, load(prompt.data() + j) + load(segment.get() + j));
        for (int64_t key = kept; key < own.keys(); key++) write(own.token_of_key(key), segment.get() + key * row);
    }
    void write_prompt(int64_t start) const {
        for (size_t key = 0; key < prompt.size() / size_t(row); key++) write(start + int64_t(key), prompt.data() + key * size_t(row));
    }
};

template <class T>
void attend_group_backward(
    const Inputs<T>& in, const Outputs<T>& given, const Segment* segments, int64_t count, int64_t kv, T* dq, T* dk, T* dv) {
    const Heads& heads = in.heads;
    const Segment* prompt = std::find_if(segments, segments + count, [](const Segment& s) { return !s.prefix_length; });
    int64_t most_keys = 0;
    for (int64_t i = 0; i < count; i++) most_keys = std::max(most_keys, segments[i].keys());
    const int64_t prompt_keys = count > 1 ? prompt->length : 0;
    KeyGradients<T> keys(dk, heads.keys, kv, heads.size, most_keys, prompt_keys);
    KeyGradients<T> values(dv, heads.keys, kv, heads.value_size, most_keys, prompt_keys);
    for (int64_t i = 0; i < count; i++) {
        attend_segment_backward(in, given, segments[i], kv, dq, keys.cleared(segments[i]), values.cleared(segments[i]));
        keys.take(segments[i]);
        values.take(segments[i]);
    }
    keys.write_prompt(prompt->start);
    values.write_prompt(prompt->start);
}

// Group g is the segments groups[g] ... groups[g + 1]: a prompt and what continues it.
template <class T>
void attend_backward(
    const Inputs<T>& in, const Outputs<T>& given, const Segment* segments, const int64_t* groups, int64_t num_groups, T* dq,
    T* dk, T* dv) {
    Memory memory;
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < num_groups * in.heads.keys; item++) {
        const int64_t group = item / in.heads.keys, first = groups[group];
        memory.run([&] {
            attend_group_backward(
                in, given, segments + first, groups[group + 1] - first, item % in.heads.keys, dq, dk, dv);
        });
    }
    memory.check();
}

}  // namespace kitae
