// Products of many groups of rows, each with a matrix of its own: the rows of an expert and the expert's weights.
//
// Numbers go in cells (cells.h) along the dimension that is summed. 64 output columns of a matrix are packed into a panel
// [cells][64] by the thread that then multiplies all rows of the group with it. A sum runs over its cells in order, whatever
// rows share the tile and whichever thread computes it: same bits.
#pragma once

#include <algorithm>
#include <vector>

#include "multiply.h"

namespace kitae {

// The rows of a tensor, or those that `index` names.
template <class T> struct RowsOf {
    const T* data;
    const int64_t* index;
    int64_t size;

    const T* operator[](int64_t row) const { return data + (index ? index[row] : row) * size; }
};

// For each of `count` rows and the panel's `width` columns, calls use(row, sums). row_at(row) is where its numbers begin, of
// which `step` cells further the next are read.
template <class T, class RowAt, class Use>
void multiply_panel(
    int64_t count, RowAt row_at, int64_t step, const Cell<T>* panel, int64_t depth, int64_t width, Use use) {
    alignas(64) float sums[TILE_ROWS * PANEL_ROWS];
    const void* rows[TILE_ROWS];
    const int64_t tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t from = count * t / tiles, to = count * (t + 1) / tiles;
        for (int64_t row = from; row < to; row++) rows[row - from] = row_at(row);
        multiply(Listed<Cell<T>>{rows, step}, panel, PANEL_ROWS, to - from, depth, whole_lanes(width), sums, PANEL_ROWS);
        for (int64_t row = from; row < to; row++) use(row, sums + (row - from) * PANEL_ROWS);
    }
}

// Where the rows of each group begin, and the end.
inline std::vector<int64_t> starts_of(const int64_t* sizes, int64_t groups) {
    std::vector<int64_t> starts(size_t(groups) + 1, 0);
    for (int64_t g = 0; g < groups; g++) starts[size_t(g) + 1] = starts[size_t(g)] + sizes[g];
    return starts;
}

template <class C> C* panel_of_thread(int64_t depth) {
    static thread_local std::vector<C> panel;
    if (int64_t(panel.size()) < depth * PANEL_ROWS) panel.resize(size_t(depth * PANEL_ROWS));
    return panel.data();
}

// work(group, first row, rows, first column, width) for every panel of every group that has rows, on whichever thread is free.
template <class Work> void each_panel(const int64_t* sizes, int64_t groups, int64_t columns, Work work) {
    const std::vector<int64_t> starts = starts_of(sizes, groups);
    const int64_t panels = whole_panels(columns) / PANEL_ROWS;
    Memory memory;
#pragma omp parallel for schedule(dynamic)
    for (int64_t piece = 0; piece < groups * panels; piece++) {
        const int64_t group = piece / panels, first = piece % panels * PANEL_ROWS;
        if (sizes[group])
            memory.run([&] { work(group, starts[size_t(group)], sizes[group], first, std::min(PANEL_ROWS, columns - first)); });
    }
    memory.check();
}

// y[row] (+)= x[row] W of the row's group. W lies [columns][depth] where it `is_along`, else [depth][columns]. The rows of x
// are read as cells where they lie, so their numbers must fill whole ones.
template <class T>
void grouped_product(
    const T* x, const int64_t* index, const int64_t* sizes, int64_t groups, const T* weights, bool is_along, int64_t depth,
    int64_t columns, bool adds, T* y) {
    const RowsOf<T> rows{x, index, depth};
    each_panel(sizes, groups, columns, [&](int64_t group, int64_t begin, int64_t count, int64_t first, int64_t width) {
        Cell<T>* panel = panel_of_thread<Cell<T>>(cells<T>(depth));
        const T* own = weights + group * depth * columns;
        if (is_along)
            pack_panels<T>([=](int64_t column) { return own + (first + column) * depth; }, width, depth, panel);
        else
            pack_pairs<T>([=](int64_t k) { return own + k * columns + first; }, depth, width, panel, PANEL_ROWS);
        const auto row_at = [&](int64_t row) { return rows[begin + row]; };
        multiply_panel<T>(count, row_at, 1, panel, cells<T>(depth), width, [&](int64_t row, const float* sums) {
            T* to = y + (begin + row) * columns + first;
            for (int64_t j = 0; j < width; j += LANES) {
                const f32x16 sum = load(sums + j);
                store_some(to + j, adds ? load_some(to + j, width - j) + sum : sum, width - j);
            }
        });
    });
}

// sums[group][row][column] += sum of y[..][row] x[..][column] over the group's rows of y [..][rows] and x [..][columns].
template <class T, class Sum>
void grouped_outer(
    const T* y, const int64_t* y_index, const T* x, const int64_t* x_index, const int64_t* sizes, int64_t groups, int64_t rows,
    int64_t columns, Sum* sums) {
    const RowsOf<T> left{y, y_index, rows}, right{x, x_index, columns};
    std::vector<int64_t> depths(static_cast<size_t>(groups));
    for (int64_t g = 0; g < groups; g++) depths[size_t(g)] = cells<T>(sizes[g]);
    const std::vector<int64_t> starts = starts_of(depths.data(), groups);
    const int64_t stride = whole_lanes(rows);
    const auto packed = buffer<Cell<T>>(starts.back() * stride);
    each_panel(sizes, groups, rows, [&](int64_t group, int64_t begin, int64_t count, int64_t first, int64_t width) {
        Cell<T>* to = packed.get() + starts[size_t(group)] * stride + first;
        pack_pairs<T>([&](int64_t row) { return left[begin + row] + first; }, count, width, to, stride);
    });
    each_panel(sizes, groups, columns, [&](int64_t group, int64_t begin, int64_t count, int64_t first, int64_t width) {
        const int64_t depth = depths[size_t(group)];
        Cell<T>* panel = panel_of_thread<Cell<T>>(depth);
        pack_pairs<T>([&](int64_t row) { return right[begin + row] + first; }, count, width, panel, PANEL_ROWS);
        const Cell<T>* own = packed.get() + starts[size_t(group)] * stride;
        const auto row_at = [&](int64_t row) { return own + row; };
        multiply_panel<T>(rows, row_at, stride, panel, depth, width, [&](int64_t row, const float* products) {
            Sum* to = sums + (group * rows + row) * columns + first;
            for (int64_t j = 0; j < width; j += LANES)
                store_some(to + j, load_some(to + j, width - j) + load(products + j), width - j);
        });
    });
}

}  // namespace kitae
