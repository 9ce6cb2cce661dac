// Routed experts: each token goes through the few experts its router chooses.
//
//   scores -> chosen experts and their shares -> rows sorted by expert -> gate, up -> down -> weighted sum onto the stream
//
// A token's outputs are added in the order in which its experts were chosen, so its sums do not depend on other tokens.
#pragma once

#include <cmath>
#include <vector>

#include "groups.h"
#include "model.h"
#include "product.h"
#include "team.h"
#include "vectors.h"

namespace kitae {

// silu(gate) * up of a block of sums, see Layer::gate_up.
template <class T> inline void store_gated(T* to, const float* sums) {
    for (int j = 0; j < BLOCK / 2; j += LANES) {
        const f32x16 gate = load(sums + j), up = load(sums + BLOCK / 2 + j);
        store(to + j, gate / (1.0f + exp_of(-gate)) * up);
    }
}

// The first of the largest; 0 where nothing can be compared.
inline int64_t best_of(const float* values, int64_t count) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; i++)
        if (values[i] > values[best]) best = i;
    return best;
}

// scores[experts]: the router's logits of one token, as probabilities (softmax) or each by itself (sigmoid).
template <class T>
void score_experts(const T* x, const Routing& routing, const Experts& experts, int64_t depth, float* scores) {
    float largest = -INFINITY, total = 0;
    for (int64_t e = 0; e < routing.num_experts; e++) {
        const float* weights = experts.router + e * depth;
        f32x16 even{}, odd{};
        int64_t j = 0;
        for (; j + 2 * LANES <= depth; j += 2 * LANES) {
            even += load(x + j) * load(weights + j);
            odd += load(x + j + LANES) * load(weights + j + LANES);
        }
        scores[e] = sum_of(even + odd);
        if (routing.is_sigmoid) scores[e] = 1.0f / (1.0f + std::exp(-scores[e]));
        largest = scores[e] > largest ? scores[e] : largest;
    }
    if (routing.is_sigmoid) return;
    for (int64_t e = 0; e < routing.num_experts; e++) total += scores[e] = std::exp(scores[e] - largest);
    for (int64_t e = 0; e < routing.num_experts; e++) scores[e] /= total;
}

// The token's experts and what each contributes. Only the best groups of experts are open to it (arXiv:2412.19437, section
// 2.1.2); a bias for balance, where there is one, counts when experts are chosen and not in their shares.
inline void choose_experts(
    const float* scores, const Routing& routing, const float* bias, int32_t* chosen, float* shares) {
    static thread_local std::vector<float> ranks, group_ranks, group;
    ranks.assign(scores, scores + routing.num_experts);
    if (bias)
        for (int64_t e = 0; e < routing.num_experts; e++) ranks[e] += bias[e];
    if (routing.num_open_groups < routing.num_groups) {
        const int64_t size = routing.num_experts / routing.num_groups;
        group_ranks.assign(size_t(routing.num_groups), 0.0f);
        for (int64_t g = 0; g < routing.num_groups; g++) {
            group.assign(ranks.begin() + g * size, ranks.begin() + (g + 1) * size);
            for (int64_t i = 0; i < routing.best_of_group; i++) {
                const int64_t best = best_of(group.data(), size);
                group_ranks[g] += group[best];
                group[best] = -INFINITY;
            }
        }
        for (int64_t closed = routing.num_groups - routing.num_open_groups; closed > 0; closed--) {
            int64_t worst = 0;
            for (int64_t g = 1; g < routing.num_groups; g++)
                if (group_ranks[g] <= group_ranks[worst]) worst = g;
            group_ranks[worst] = INFINITY;
            for (int64_t e = worst * size; e < (worst + 1) * size; e++) ranks[e] = -INFINITY;
        }
    }
    float total = 0;
    for (int64_t i = 0; i < routing.num_chosen; i++) {
        const int64_t best = best_of(ranks.data(), routing.num_experts);
        chosen[i] = int32_t(best);
        shares[i] = scores[best];
        total += scores[best];
        ranks[best] = -INFINITY;
    }
    const float factor = routing.scale / (routing.is_normalised ? total + 1e-20f : 1.0f);
    for (int64_t i = 0; i < routing.num_chosen; i++) shares[i] *= factor;
}

// Each row's place when rows are sorted by expert, and where each expert's begin: first[experts + 1].
inline void sort_by_expert(const int32_t* chosen, int64_t count, int64_t experts, int32_t* place, int32_t* first) {
    static thread_local std::vector<int32_t> next;
    next.assign(size_t(experts), 0);
    for (int64_t i = 0; i < count; i++) next[chosen[i]]++;
    first[0] = 0;
    for (int64_t e = 0; e < experts; e++) {
        first[e + 1] = first[e] + next[e];
        next[e] = first[e];
    }
    for (int64_t i = 0; i < count; i++) place[i] = next[chosen[i]]++;
}

// The experts' part of one layer: reads the normalised rows, adds to the residual stream.
template <class T>
void run_experts(const Team& team, const Model& model, const Layer& layer, const Scratch& scratch, int64_t count) {
    const Routing& routing = model.routing;
    const Experts& experts = layer.experts;
    const int64_t each = routing.num_chosen, stride = scratch.hidden_stride, inner = scratch.expert_activated_stride;
    const T* normed = static_cast<const T*>(scratch.normed);
    T* rows = static_cast<T*>(scratch.expert_rows);
    T* activated = static_cast<T*>(scratch.expert_activated);
    team.share(count, [&](Range mine) {
        static thread_local std::vector<float> scores;
        scores.resize(size_t(routing.num_experts));
        for (int64_t t = mine.begin; t < mine.end; t++) {
            score_experts(normed + t * stride, routing, experts, stride, scores.data());
            choose_experts(scores.data(), routing, experts.bias, scratch.chosen + t * each, scratch.shares + t * each);
        }
    });
    team.share(1, [&](Range) {
        sort_by_expert(scratch.chosen, count * each, routing.num_experts, scratch.place, scratch.first_row);
    });
    team.share(count, [&](Range mine) {
        for (int64_t i = mine.begin * each; i < mine.end * each; i++)
            std::memcpy(rows + scratch.place[i] * stride, normed + i / each * stride, size_t(stride) * sizeof(T));
    });
    const auto multiply_sorted = [&](const Matrix& first, const T* x, int64_t width, auto use) {
        const auto multiply_all = [&](auto all) {
            const auto rows_of = [&](int64_t e) { return all.part(scratch.first_row[e], scratch.first_row[e + 1]); };
            multiply_groups(team, first, routing.num_experts, rows_of, use);
        };
        if (first.scales)
            multiply_all(quantise(team, scratch, x, width, count * each, first.depth));
        else
            multiply_all(Rows<T>{x, width, count * each, nullptr});
    };
    multiply_sorted(experts.gate_up, rows, stride, [&](int64_t e, int64_t row, int64_t block, const float* sums) {
        store_gated(activated + (scratch.first_row[e] + row) * inner + block * BLOCK / 2, sums);
    });
    multiply_sorted(experts.down, activated, inner, [&](int64_t e, int64_t row, int64_t block, const float* sums) {
        float* to = scratch.expert_out + (scratch.first_row[e] + row) * stride + block * BLOCK;
        std::memcpy(to, sums, BLOCK * sizeof(float));
    });
    team.share(count, [&](Range mine) {
        for (int64_t t = mine.begin; t < mine.end; t++)
            for (int64_t i = t * each; i < (t + 1) * each; i++) {
                float* to = scratch.hidden + t * stride;
                const float* from = scratch.expert_out + scratch.place[i] * stride;
                for (int64_t j = 0; j < stride; j += LANES) store(to + j, load(to + j) + load(from + j) * scratch.shares[i]);
            }
    });
}

}  // namespace kitae
