// C (+)= A B in float32 with tiles in registers: A [m][k] of any strides, B [k][n] and C [m][n] in rows, 16 divides n.
#pragma once

#include "numbers.h"

namespace kitae {

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 3, TILE_VECTORS = 2;
#endif

struct Strided {
    const float* data;
    int64_t row, column;  // how far apart neighbours are
};

template <int ROWS, int VECTORS>
void multiply_tile(Strided a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row, bool adds) {
    f32x16 sums[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < depth; k++) {
        f32x16 columns[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) columns[v] = load(b + k * b_row + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++) {
            const f32x16 factor = splat(a.data[r * a.row + k * a.column]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[r][v] += factor * columns[v];
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

template <int VECTORS, int ROWS = TILE_ROWS>
void multiply_rows(Strided a, const float* b, int64_t b_row, int64_t rows, int64_t depth, float* c, int64_t c_row, bool adds) {
    for (; rows >= ROWS; rows -= ROWS, a.data += ROWS * a.row, c += ROWS * c_row)
        multiply_tile<ROWS, VECTORS>(a, b, b_row, depth, c, c_row, adds);
    if constexpr (ROWS > 1)
        if (rows) multiply_rows<VECTORS, ROWS - 1>(a, b, b_row, rows, depth, c, c_row, adds);
}

inline void multiply(
    Strided a, const float* b, int64_t b_row, int64_t rows, int64_t depth, int64_t columns, float* c, int64_t c_row,
    bool adds = false) {
    int64_t from = 0;
    for (; columns - from >= TILE_VECTORS * LANES; from += TILE_VECTORS * LANES)
        multiply_rows<TILE_VECTORS>(a, b + from, b_row, rows, depth, c + from, c_row, adds);
    for (; from < columns; from += LANES) multiply_rows<1>(a, b + from, b_row, rows, depth, c + from, c_row, adds);
}

}  // namespace kitae
