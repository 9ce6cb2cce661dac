// From one row of logits to a token and its log-probability, by the inverse of the cumulative distribution.
#pragma once

#include <cmath>
#include <vector>

#include "vectors.h"

namespace kitae {

constexpr int64_t SUMMED = 256;  // probabilities added up at a time: first the block is found, then the token inside

struct Choice {
    int64_t id;
    float logprob;
};

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
        double rest = uniform * total;
        size_t block = 0;
        while (block + 1 < sums.size() && rest >= sums[block]) rest -= sums[block++];
        // Where rounding leaves too much, the last token of the block that has any probability is taken.
        const int64_t first = int64_t(block) * SUMMED;
        const int64_t end = first + SUMMED < vocabulary ? first + SUMMED : vocabulary;
        id = first;
        for (int64_t j = first; j < end; j++) {
            const float exponent = (logits[j] - largest) * factor;
            if (exponent < -87.0f) continue;  // 0 in the sums
            const double weight = std::exp(double(exponent));
            id = j;
            if (rest < weight) break;
            rest -= weight;
        }
    } else {
        while (id + 1 < vocabulary && !(logits[id] == largest)) id++;
    }
    return {id, (logits[id] - largest) * factor - float(std::log(total))};
}

}  // namespace kitae
