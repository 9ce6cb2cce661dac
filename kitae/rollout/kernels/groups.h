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

// For each group g, row and block of 64 columns of rows_of(g) times the group's weights, calls use(g, row, block, sums[64]).
// `first` is the matrix of group 0; weights and scales of the others follow it, without bias.
template <class RowsOf, class Use>
void multiply_groups(const Team& team, const Matrix& first, int64_t groups, RowsOf rows_of, Use use) {
    using T = typename decltype(rows_of(0))::Number;
    constexpr int most = Packing<T>::rows;
    using Weight = typename Packing<T>::Weight;
    const int64_t blocks = first.columns / BLOCK, block_size = first.depth * BLOCK;
    const auto compute = [&](int64_t group, int64_t block, Rows<T> rows, bool is_cold, bool is_last) {
        alignas(64) typename Packing<T>::Sum sums[most * BLOCK];
        alignas(64) float numbers[BLOCK];
        const int64_t place = group * blocks + block;
        const Weight* weights = static_cast<const Weight*>(first.weights) + place * block_size;
        const int64_t tiles = (rows.count + most - 1) / most;
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t from = rows.count * t / tiles, to = rows.count * (t + 1) / tiles;
            const Weight* following = is_last ? nullptr : weights + block_size;
            const Prefetch prefetch = prefetch_of(t, tiles, is_cold, weights, following, block_size * int64_t(sizeof(Weight)));
            tile_of<T>(int(to - from), rows.x + from * rows.stride, rows.stride, weights, first.depth, sums, prefetch);
            for (int64_t row = from; row < to; row++)
                use(group, row, block, finish(sums + (row - from) * BLOCK, first, place * BLOCK, rows.scale_of(row), numbers));
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
            const int64_t from = pieces_up_to(begin, each), last = pieces_up_to(end, each), to = last < blocks ? last : blocks;
            for (int64_t b = from; b < to; b++) compute(g, b, rows, b == from, b + 1 == to);
            before += each * blocks;
        }
    });
}

}  // namespace kitae
