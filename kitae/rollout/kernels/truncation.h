// Which tokens top-k, top-p and min-p leave: those whose logit is not below a threshold. Nothing is sorted but a few logits
// around it.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace kitae {

constexpr int64_t SUMMED = 256;  // weights added up at a time in float, before a double takes their sum

// What one row's sampling settings ask for.
struct Truncation {
    int64_t top_k;    // 0: off
    float top_p;      // 1: off
    float log_min_p;  // minus infinity: off

    bool is_on() const { return top_k > 0 || top_p < 1 || log_min_p > -INFINITY; }
};

// Weights of all values that are not below a bound, for some bounds at once.
template <int BOUNDS>
void sums_above(const float* values, const float* weights, int64_t padded, const float* bounds, double* sums) {
    for (int i = 0; i < BOUNDS; i++) sums[i] = 0;
    for (int64_t first = 0; first < padded; first += SUMMED) {
        const int64_t end = std::min(first + SUMMED, padded);
        f32x16 part[BOUNDS] = {};
        for (int64_t j = first; j < end; j += LANES) {
            const f32x16 value = load(values + j), weight = load(weights + j);
            for (int i = 0; i < BOUNDS; i++) part[i] += value >= bounds[i] ? weight : f32x16{};
        }
        for (int i = 0; i < BOUNDS; i++) sums[i] += double(sum_of(part[i]));
    }
}

// The largest of the values for which it and all larger ones together weigh at least `wanted`. `padded`, a multiple of 16, counts
// values and padding, which is minus infinity. All values that have weight lie in [low, high], which is cut into five parts
// again and again; what is left is sorted.
inline float threshold_of(
    const float* values, const float* weights, int64_t padded, double wanted, float low, float high) {
    constexpr int BOUNDS = 4, PASSES = 5;
    static thread_local std::vector<std::pair<float, float>> candidates;  // value, weight
    high = std::nextafter(high, INFINITY);
    double above = 0;  // weight of the values from `high` on
    for (int pass = 0; pass < PASSES; pass++) {
        float bounds[BOUNDS];
        double sums[BOUNDS];
        for (int i = 0; i < BOUNDS; i++) bounds[i] = low + (high - low) * float(i + 1) / (BOUNDS + 1);
        sums_above<BOUNDS>(values, weights, padded, bounds, sums);
        for (int i = 0; i < BOUNDS; i++) {
            if (sums[i] >= wanted) {
                low = bounds[i];
            } else {
                high = bounds[i];
                above = sums[i];
                break;
            }
        }
    }
    candidates.clear();
    for (int64_t first = 0; first < padded; first += LANES) {
        if (largest_of(load(values + first)) < low) continue;
        for (int64_t j = first; j < first + LANES; j++)
            if (values[j] >= low && values[j] < high) candidates.emplace_back(values[j], weights[j]);
    }
    std::sort(candidates.begin(), candidates.end(), std::greater<>());
    for (const auto& [value, weight] : candidates)
        if ((above += double(weight)) >= wanted) return value;
    return candidates.empty() ? low : candidates.back().first;  // rounding left the sum a little short
}

// e^(value - largest) where the value is not below the threshold, else 0. Returns their sum; `sums` are those of each block.
inline double weigh(
    const float* values, int64_t padded, float largest, float threshold, float* weights, std::vector<double>& sums) {
    sums.clear();
    double total = 0;
    for (int64_t first = 0; first < padded; first += SUMMED) {
        const int64_t end = std::min(first + SUMMED, padded);
        f32x16 sum{};
        for (int64_t j = first; j < end; j += LANES) {
            const f32x16 value = load(values + j);
            const f32x16 weight = value >= threshold ? exp_of(value - largest) : f32x16{};
            store(weights + j, weight);
            sum += weight;
        }
        sums.push_back(double(sum_of(sum)));
        total += sums.back();
    }
    return total;
}

// Every value from it on is kept: of the k likeliest, those within the first top_p of their probability, and of these those not
// below min_p times the likeliest. `values` are logits over the temperature, finite but for the padding; `weights` is
// room for as many numbers, `sums` for those of blocks.
inline float threshold_of(
    const float* values, int64_t count, int64_t padded, float lowest, float largest, const Truncation& truncation,
    float* weights, std::vector<double>& sums) {
    float threshold = -INFINITY;
    if (truncation.top_k > 0 && truncation.top_k < count) {
        std::fill_n(weights, padded, 1.0f);
        threshold = threshold_of(values, weights, padded, double(truncation.top_k), lowest, largest);
    }
    if (truncation.top_p < 1) {
        const double total = weigh(values, padded, largest, threshold, weights, sums);
        const float low = std::max({threshold, lowest, largest - 88.0f});  // weights are 0 below
        const double wanted = double(truncation.top_p) * total;
        threshold = std::max(threshold, threshold_of(values, weights, padded, wanted, low, largest));
    }
    return std::max(threshold, largest + truncation.log_min_p);
}

}  // namespace kitae
