// Rows of logits to the log-probability of each row's target and the row's entropy, and in place to the gradient of that
// log-probability.
#pragma once

#include <vector>

#include "numbers.h"

namespace kitae {

// logits are divided by `temperature` first. Where `scales` is given, a row ends as scale (onehot - p), the gradient of
// scale x log p(target) in the undivided logits times `temperature`: whoever asks has divided the scales by it.
template <class T>
void target_logprobs(
    T* logits, const int64_t* targets, int64_t rows, int64_t vocabulary, float temperature, const float* scales,
    float* logprobs, float* lse, float* entropies) {
    const float inverse = 1.0f / temperature;
    Memory memory;
#pragma omp parallel
    {
        std::vector<float> exps;
        memory.run([&] { exps.resize(scales ? size_t(vocabulary + LANES) : 0); });
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            if (memory.is_out()) continue;
            T* own = logits + row * vocabulary;
            const int64_t whole = vocabulary / LANES * LANES;
            float most = -INFINITY;
            if (whole) {
                f32x16 largest = load(own);
                for (int64_t j = LANES; j < whole; j += LANES) largest = larger(largest, load(own + j));
                most = largest_of(largest);
            }
            for (int64_t j = whole; j < vocabulary; j++) most = to_float(own[j]) > most ? to_float(own[j]) : most;
            most *= inverse;
            f32x16 sums{}, products{};
            for (int64_t j = 0; j < whole; j += LANES) {
                const f32x16 x = load(own + j) * inverse - most, e = exp_of(x);
                sums += e;
                products += e * x;
                if (scales) store(exps.data() + j, e);
            }
            float sum = sum_of(sums), product = sum_of(products);
            for (int64_t j = whole; j < vocabulary; j++) {
                const float x = to_float(own[j]) * inverse - most, e = std::exp(x);
                sum += e;
                product += e * x;
                if (scales) exps[size_t(j)] = e;
            }
            const float shifted = to_float(own[targets[row]]) * inverse - most;
            logprobs[row] = shifted - std::log(sum);
            lse[row] = most + std::log(sum);
            entropies[row] = std::log(sum) - product / sum;  // -sum p log p with log p = x - log(sum)
            if (!scales) continue;
            const float scale = scales[row], share = -scale / sum;
            const float at_target = scale + exps[size_t(targets[row])] * share;
            for (int64_t j = 0; j < vocabulary; j += LANES)
                store_some(own + j, load(exps.data() + j) * share, vocabulary - j);
            narrow(own + targets[row], at_target);
        }
    }
    memory.check();
}

}  // namespace kitae
