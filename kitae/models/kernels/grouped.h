// Products of many groups of rows, each with a matrix of its own: the rows of an expert and the expert's weights.
//
// Numbers go in words of 32 bits along the dimension that is summed: one float, or two bf16 neighbours. 64 output columns of
// a matrix are packed into a panel [words][64] by the thread that then multiplies all rows of the group with it. A sum runs
// over its words in order, whatever rows share the tile and whichever thread computes it: same bits.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "multiply.h"

namespace kitae {

constexpr int64_t PANEL = 64;  // columns

template <class T> constexpr int64_t PER_WORD = int64_t(sizeof(uint32_t) / sizeof(T));

inline int64_t words_of(const float*, int64_t count) { return count; }
inline int64_t words_of(const bf16*, int64_t count) { return (count + 1) / 2; }

inline f32x16 add_product(const float*, f32x16 sum, uint32_t a, u32x16 b) {
    float factor;
    std::memcpy(&factor, &a, sizeof factor);
    return sum + splat(factor) * (f32x16)b;
}

inline f32x16 add_product(const bf16*, f32x16 sum, uint32_t a, u32x16 b) {
#if defined(__AVX512BF16__)
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, (__m512bh)(a - u32x16{}));
#else
    // A bf16 becomes a float when it is the upper half of one.
    sum += (f32x16)((a << 16) - u32x16{}) * (f32x16)(b << 16);
    return sum + (f32x16)((a & 0xffff0000u) - u32x16{}) * (f32x16)(b & 0xffff0000u);
#endif
}

inline u32x16 load_words(const uint32_t* from) {
    u32x16 x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// sums[ROWS][PANEL] at VECTORS of its columns: word k of row r lies at rows[r] + k * step.
template <class T, int ROWS, int VECTORS>
void panel_tile(const uint32_t* const* rows, int64_t step, const uint32_t* panel, int64_t words, float* sums) {
    const uint32_t* from[ROWS];
    for (int r = 0; r < ROWS; r++) from[r] = rows[r];
    f32x16 total[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < words; k++) {
        u32x16 columns[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) columns[v] = load_words(panel + k * PANEL + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            uint32_t word;
            std::memcpy(&word, from[r] + k * step, sizeof word);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) total[r][v] = add_product((const T*)nullptr, total[r][v], word, columns[v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) store(sums + r * PANEL + v * LANES, total[r][v]);
}

template <class T, int ROWS = TILE_ROWS>
void panel_rows(
    int64_t count, const uint32_t* const* rows, int64_t step, const uint32_t* panel, int64_t words, int64_t width, float* sums) {
    if constexpr (ROWS > 1)
        if (count < ROWS) return panel_rows<T, ROWS - 1>(count, rows, step, panel, words, width, sums);
    int64_t first = 0;
    for (; first + TILE_VECTORS * LANES <= width; first += TILE_VECTORS * LANES)
        panel_tile<T, ROWS, TILE_VECTORS>(rows, step, panel + first, words, sums + first);
    for (; first < width; first += LANES) panel_tile<T, ROWS, 1>(rows, step, panel + first, words, sums + first);
}

// For each of `count` rows and the panel's `width` columns, calls use(row, sums). row_at(row) is where its words begin.
template <class T, class RowAt, class Use>
void multiply_panel(
    int64_t count, RowAt row_at, int64_t step, const uint32_t* panel, int64_t words, int64_t width, Use use) {
    alignas(64) float sums[TILE_ROWS * PANEL];
    const uint32_t* rows[TILE_ROWS];
    const int64_t tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t from = count * t / tiles, to = count * (t + 1) / tiles;
        for (int64_t row = from; row < to; row++) rows[row - from] = row_at(row);
        panel_rows<T>(to - from, rows, step, panel, words, width, sums);
        for (int64_t row = from; row < to; row++) use(row, sums + (row - from) * PANEL);
    }
}

// The rows of a tensor, or those that `index` names.
template <class T> struct RowsOf {
    const T* data;
    const int64_t* index;
    int64_t size;

    const T* operator[](int64_t row) const { return data + (index ? index[row] : row) * size; }
};

// words[depth / 2 or depth][stride] of columns first ... first + width, where the summed dimension goes down the rows.
inline void pack_down(const RowsOf<float>& x, int64_t begin, int64_t depth, int64_t first, int64_t width, int64_t stride, uint32_t* words) {
    for (int64_t k = 0; k < depth; k++) std::memcpy(words + k * stride, x[begin + k] + first, size_t(width) * sizeof(float));
}

inline void pack_down(const RowsOf<bf16>& x, int64_t begin, int64_t depth, int64_t first, int64_t width, int64_t stride, uint32_t* words) {
    for (int64_t k = 0; k < depth; k += 2, words += stride) {
        const bf16 *low = x[begin + k] + first, *high = k + 1 < depth ? x[begin + k + 1] + first : nullptr;
        for (int64_t j = 0; j < width; j++) words[j] = low[j].bits | (high ? uint32_t(high[j].bits) << 16 : 0u);
    }
}

// panel[words][PANEL] of rows first ... first + width, where the summed dimension goes along each row, in whole words.
template <class T>
void pack_along(const T* rows, int64_t depth, int64_t first, int64_t width, uint32_t* panel) {
    constexpr int64_t STRIP = 16;  // words of a cache line
    const int64_t words = depth / PER_WORD<T>;
    for (int64_t strip = 0; strip < words; strip += STRIP)
        for (int64_t j = 0; j < width; j++) {
            const T* from = rows + (first + j) * depth;
            for (int64_t k = strip; k < std::min(words, strip + STRIP); k++)
                std::memcpy(panel + k * PANEL + j, from + k * PER_WORD<T>, sizeof(uint32_t));
        }
}

// Where the rows of each group begin, and the end.
inline std::vector<int64_t> starts_of(const int64_t* sizes, int64_t groups) {
    std::vector<int64_t> starts(size_t(groups) + 1, 0);
    for (int64_t g = 0; g < groups; g++) starts[size_t(g) + 1] = starts[size_t(g)] + sizes[g];
    return starts;
}

inline uint32_t* scratch_of_thread(int64_t words) {
    static thread_local std::vector<uint32_t> scratch;
    if (int64_t(scratch.size()) < words) scratch.resize(size_t(words));
    return scratch.data();
}

// work(group, first row, rows, first column, width) for every panel of every group that has rows, on whichever thread is free.
template <class Work> void each_panel(const int64_t* sizes, int64_t groups, int64_t columns, Work work) {
    const std::vector<int64_t> starts = starts_of(sizes, groups);
    const int64_t panels = (columns + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(dynamic)
    for (int64_t piece = 0; piece < groups * panels; piece++) {
        const int64_t group = piece / panels, first = piece % panels * PANEL;
        if (sizes[group]) work(group, starts[size_t(group)], sizes[group], first, std::min(PANEL, columns - first));
    }
}

// y[row] (+)= x[row] W of the row's group. W lies [columns][depth] where it `is_along`, else [depth][columns].
template <class T>
void grouped_product(
    const T* x, const int64_t* index, const int64_t* sizes, int64_t groups, const T* weights, bool is_along, int64_t depth,
    int64_t columns, bool adds, T* y) {
    const RowsOf<T> rows{x, index, depth};
    const int64_t words = words_of(x, depth);
    each_panel(sizes, groups, columns, [&](int64_t group, int64_t begin, int64_t count, int64_t first, int64_t width) {
        uint32_t* panel = scratch_of_thread(words * PANEL);
        const T* own = weights + group * depth * columns;
        if (is_along)
            pack_along(own, depth, first, width, panel);
        else
            pack_down(RowsOf<T>{own, nullptr, columns}, 0, depth, first, width, PANEL, panel);
        const auto row_at = [&](int64_t row) { return reinterpret_cast<const uint32_t*>(rows[begin + row]); };
        multiply_panel<T>(count, row_at, 1, panel, words, width, [&](int64_t row, const float* sums) {
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
    for (int64_t g = 0; g < groups; g++) depths[size_t(g)] = words_of(y, sizes[g]);
    const std::vector<int64_t> starts = starts_of(depths.data(), groups);
    const std::unique_ptr<uint32_t[]> packed(new uint32_t[size_t(starts.back() * rows)]);
    each_panel(sizes, groups, rows, [&](int64_t group, int64_t begin, int64_t count, int64_t first, int64_t width) {
        pack_down(left, begin, count, first, width, rows, packed.get() + starts[size_t(group)] * rows + first);
    });
    each_panel(sizes, groups, columns, [&](int64_t group, int64_t begin, int64_t count, int64_t first, int64_t width) {
        const int64_t words = depths[size_t(group)];
        uint32_t* panel = scratch_of_thread(words * PANEL);
        pack_down(right, begin, count, first, width, PANEL, panel);
        const uint32_t* own = packed.get() + starts[size_t(group)] * rows;
        const auto row_at = [&](int64_t row) { return own + row; };
        multiply_panel<T>(rows, row_at, rows, panel, words, width, [&](int64_t row, const float* products) {
            Sum* to = sums + (group * rows + row) * columns + first;
            for (int64_t j = 0; j < width; j += LANES)
                store_some(to + j, load_some(to + j, width - j) + load(products + j), width - j);
        });
    });
}

}  // namespace kitae
