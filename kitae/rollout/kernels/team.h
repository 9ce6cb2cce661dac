// The threads that run one call together. Every thread walks through the same phases; a barrier ends each.
#pragma once

#include <cstdint>

namespace kitae {

struct Range {
    int64_t begin, end;
};

struct Team {
    int id, size;

    // This thread's share of `count` pieces of work.
    Range share(int64_t count) const { return {count * id / size, count * (id + 1) / size}; }

    void barrier() const {
#pragma omp barrier
    }
};

}  // namespace kitae
