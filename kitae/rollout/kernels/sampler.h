// From one row of logits to a token and its log-probability, by the inverse of the cumulative distribution.
#pragma once

#include <cmath>
#include <vector>

#include "truncation.h"
#include "vectors.h"

namespace kitae {

struct Choice {
    int64_t id;
    float logprob;
};

// The token at which the running sum of weights passes `rest`: first the block of SUMMED is found by the blocks' sums, then the
// token inside by weight_of(j). Where rounding leaves too much, the last token of the block that has any weight is taken.
template <class WeightOf>
int64_t token_at(const std::vector<double>& sums, int64_t vocabulary, double rest, const WeightOf& weight_of) {
    size_t block = 0;
    while (block + 1 < sums.size() && rest >= sums[block]) rest -= sums[block++];
    const int64_t first = int64_t(block) * SUMMED;
    const int64_t end = first + SUMMED < vocabulary ? first + SUMMED : vocabulary;
    int64_t id = first;
    for (int64_t j = first; j < end; j++) {
        const double weight = weight_of(j);
        if (weight == 0) continue;
        id = j;
        if (rest < weight) break;
        rest -= weight;
    }
    return id;
}

// `logits` has room for `vocabulary` rounded up to 16, of which the rest is overwritten. A greedy choice (temperature 0) has
// the log-probability of temperature 1. Logits that are not finite give a log-probability that is not.
inline Choice choose(float* logits, int64_t vocabulary, float temperature, double uniform) {
    static thread_local std::vector<double> sums;
    const int64_t padded = (vocabulary + LANES - 1) / LANES * LANES;
    for (int64_t j = vocabulary; j < padded; j++) logits[j] = -INFINITY;
    const float factor = temperature > 0 ? 1.0f / temperature : 1.0f;
    f32x16 most = load(logits);
    for (int64_t j = LANES; j < padded; j += LANES) most = larger(load(logits + j), most);
    const float largest = largest_of(most);

    sums.clear();
    double total = 0;
    for (int64_t first = 0; first < padded; first += SUMMED) {
        const int64_t end = first + SUMMED < padded ? first + SUMMED : padded;
        f32x16 sum{};
        for (int64_t j = first; j < end; j += LANES) sum += exp_of((load(logits + j) - largest) * factor);
        sums.push_back(double(sum_of(sum)));
        total += sums.back();
    }

    int64_t id = 0;
    if (temperature > 0) {
        id = token_at(sums, vocabulary, uniform * total, [&](int64_t j) {
            const float exponent = (logits[j] - largest) * factor;
            return exponent < -87.0f ? 0.0 : std::exp(double(exponent));  // 0 in the sums too
        });
    } else {
        while (id + 1 < vocabulary && !(logits[id] == largest)) id++;
    }
    return {id, (logits[id] - largest) * factor - float(std::log(total))};
}

// The same among the tokens that a truncation leaves, for a temperature above 0. Where `kept` is given, bit j of it, counted from
// the lowest of the first byte, says whether token j was left.
inline Choice choose_among(
    const float* logits, int64_t vocabulary, float temperature, const Truncation& truncation, double uniform, uint8_t* kept) {
    static thread_local std::vector<float> values, weights;
    static thread_local std::vector<double> sums;
    const int64_t padded = (vocabulary + LANES - 1) / LANES * LANES;
    weights.resize(size_t(padded));
    values.assign(size_t(padded), logits[0]);
    std::copy_n(logits, vocabulary, values.data());
    f32x16 least = splat(INFINITY), most = splat(-INFINITY), nothing{};
    for (int64_t j = 0; j < padded; j += LANES) {
        const f32x16 value = load(values.data() + j) / temperature;
        store(values.data() + j, value);
        least = least < value ? least : value;
        most = larger(value, most);
        nothing += value * 0.0f;
    }
    if (!(sum_of(nothing) == 0)) return {0, NAN};  // a logit is not finite
    std::fill(values.begin() + vocabulary, values.end(), -INFINITY);
    const float largest = largest_of(most), lowest = -largest_of(-least);
    const float threshold =
        threshold_of(values.data(), vocabulary, padded, lowest, largest, truncation, weights.data(), sums);
    const double total = weigh(values.data(), padded, largest, threshold, weights.data(), sums);
    if (kept)
        for (int64_t j = 0; j < vocabulary; j++) kept[j / 8] |= uint8_t((values[j] >= threshold) << (j % 8));
    const int64_t id =
        token_at(sums, vocabulary, uniform * total, [&](int64_t j) { return double(weights[j]); });
    return {id, (values[id] - largest) - float(std::log(total))};
}

}  // namespace kitae
