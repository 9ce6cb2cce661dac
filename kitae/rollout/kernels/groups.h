// Products of many groups of rows, each group's with weights of its own: the rows of an expert, or of an attention head.
//
// Pieces of the work (a group's rows times 64 columns) lie group by group, so that a group's rows stay in the cache while
// its weights pass by once. The threads' parts are cut by cost, since some experts have many rows and most have none.
#pragma once

#include "model.h"
#include "product.h"
#include "team.h"

namespace kitae {

constexpr int64_t WEIGHTS_COST = 8;  // reading a block of weights costs as much as computing so many rows with it
constexpr int64_t CUTS = 1024;       // finest parts; a number that does not depend on what is in memory, see team.h

template <class T> struct Rows {
    const T* x;
    int64_t count;
};

// For each group g, row and block of 64 columns of rows_of(g) times the group's weights, calls use(g, row, block, sums[64]).
// `first` is the matrix of group 0; the weights of the others follow it, without bias. Rows lie `stride` apart.
template <class T, class RowsOf, class Use>
void multiply_groups(const Team& team, const Matrix& first, int64_t groups, int64_t stride, RowsOf rows_of, Use use) {
    constexpr int most = Packing<T>::rows;
    const int64_t blocks = first.columns / BLOCK, block_size = first.depth * BLOCK;
    const auto compute = [&](int64_t group, int64_t block, Rows<T> rows) {
        alignas(64) float sums[most * BLOCK];
        const T* weights = static_cast<const T*>(first.weights) + (group * blocks + block) * block_size;
        const int64_t tiles = (rows.count + most - 1) / most;
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t from = rows.count * t / tiles, to = rows.count * (t + 1) / tiles;
            Prefetch prefetch{reinterpret_cast<const char*>(weights), 0};
            if (t == 0) prefetch = {reinterpret_cast<const char*>(weights) + 4096, 4};
            tile_of<T>(int(to - from), rows.x + from * stride, stride, weights, first.depth, sums, prefetch);
            for (int64_t row = from; row < to; row++) use(group, row, block, sums + (row - from) * BLOCK);
        }
    };
    const auto cost_of = [](int64_t rows) { return rows ? rows + WEIGHTS_COST : 0; };
    team.share(CUTS, [&](Range work) {
        int64_t total = 0, before = 0;
        for (int64_t g = 0; g < groups; g++) total += cost_of(rows_of(g).count) * blocks;
        const int64_t begin = total * work.begin / CUTS, end = total * work.end / CUTS;
        // A piece belongs to the part in which it begins.
        const auto pieces_up_to = [&](int64_t cost, int64_t each) {
            return cost > before ? (cost - before + each - 1) / each : 0;
        };
        for (int64_t g = 0; g < groups; g++) {
            const Rows<T> rows = rows_of(g);
            const int64_t each = cost_of(rows.count);
            if (!each) continue;
            const int64_t last = pieces_up_to(end, each);
            for (int64_t b = pieces_up_to(begin, each); b < last && b < blocks; b++) compute(g, b, rows);
            before += each * blocks;
        }
    });
}

}  // namespace kitae
