// C (+)= A B in float32 with tiles in registers: A [m][k] Strided or Listed, B [k][n] and C [m][n] in rows, 16 divides n. A
// and B are of cells (cells.h), so k counts pairs where the numbers are bfloat16.
#pragma once

#include "cells.h"

namespace kitae {

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 3, TILE_VECTORS = 2;
#endif

template <class C> struct Strided {
    const C* data;
    int64_t row, column;  // how far apart neighbours are

    C at(int64_t r, int64_t k) const { return data[r * row + k * column]; }
    Strided from(int64_t r) const { return {data + r * row, row, column}; }
};

// Rows that lie anywhere, their cells `step` apart.
template <class C> struct Listed {
    const void* const* rows;
    int64_t step;

    C at(int64_t r, int64_t k) const {
        C cell;
        std::memcpy(&cell, static_cast<const char*>(rows[r]) + k * step * int64_t(sizeof cell), sizeof cell);
        return cell;
    }
    Listed from(int64_t r) const { return {rows + r, step}; }
};

template <int ROWS, int VECTORS, class A, class C>
void multiply_tile(A a, const C* b, int64_t b_row, int64_t depth, float* c, int64_t c_row, bool adds) {
    f32x16 sums[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < depth; k++) {
        decltype(load_cells(b)) columns[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) columns[v] = load_cells(b + k * b_row + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const C factor = a.at(r, k);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[r][v] = add_product(sums[r][v], factor, columns[v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            float* to = c + r * c_row + v * LANES;
            store(to, adds ? load(to) + sums[r][v] : sums[r][v]);
        }
}

template <int VECTORS, int ROWS = TILE_ROWS, class A, class C>
void multiply_rows(A a, const C* b, int64_t b_row, int64_t rows, int64_t depth, float* c, int64_t c_row, bool adds) {
    for (; rows >= ROWS; rows -= ROWS, a = a.from(ROWS), c += ROWS * c_row)
        multiply_tile<ROWS, VECTORS>(a, b, b_row, depth, c, c_row, adds);
    if constexpr (ROWS > 1)
        if (rows) multiply_rows<VECTORS, ROWS - 1>(a, b, b_row, rows, depth, c, c_row, adds);
}

template <int VECTORS = TILE_VECTORS, class A, class C>
void multiply(
    A a, const C* b, int64_t b_row, int64_t rows, int64_t depth, int64_t columns, float* c, int64_t c_row,
    bool adds = false) {
    for (; columns >= VECTORS * LANES; columns -= VECTORS * LANES, b += VECTORS * LANES, c += VECTORS * LANES)
        multiply_rows<VECTORS>(a, b, b_row, rows, depth, c, c_row, adds);
    if constexpr (VECTORS > 1)
        if (columns) multiply<VECTORS - 1>(a, b, b_row, rows, depth, columns, c, c_row, adds);
}

}  // namespace kitae
