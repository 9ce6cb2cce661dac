// What one step of a product's sums reads: a float, or a pair of bfloat16 numbers, which AVX-512 multiplies and adds at once.
//
// Three ways to lay rows of numbers out in cells, all padded with zeros:
//   rows    [row][cell]             neighbours of a row in one cell: the left side of a product
//   panels  [64 rows][cell][row]    the same cells with 64 rows beside each other: the right side, transposed
//   pairs   [pair of rows][number]  one number of neighbouring rows in one cell: the right side, as it is; the left, transposed
#pragma once

#include <algorithm>

#include "numbers.h"

namespace kitae {

template <class T> struct CellOf;
template <> struct CellOf<float> {
    using type = float;
};
template <> struct CellOf<bf16> {
    using type = uint32_t;  // the first number is the lower half
};
template <class T> using Cell = typename CellOf<T>::type;
template <class T> constexpr int64_t PER_CELL = int64_t(sizeof(Cell<T>) / sizeof(T));
template <class T> int64_t cells(int64_t count) { return (count + PER_CELL<T> - 1) / PER_CELL<T>; }

constexpr int64_t PANEL_ROWS = 64;
inline int64_t whole_lanes(int64_t size) { return (size + LANES - 1) / LANES * LANES; }
inline int64_t whole_panels(int64_t size) { return (size + PANEL_ROWS - 1) / PANEL_ROWS * PANEL_ROWS; }

inline f32x16 load_cells(const float* from) { return load(from); }
inline u32x16 load_cells(const uint32_t* from) {
    u32x16 x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// sum + a b; of pairs, both products.
inline __attribute__((always_inline)) f32x16 add_product(f32x16 sum, float a, f32x16 b) { return sum + a * b; }
inline __attribute__((always_inline)) f32x16 add_product(f32x16 sum, uint32_t a, u32x16 b) {
#if defined(__AVX512BF16__)
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(a - u32x16{}), (__m512bh)b);
#else
    sum += (f32x16)((a << 16) - u32x16{}) * (f32x16)(b << 16);
    return sum + (f32x16)((a & 0xffff0000u) - u32x16{}) * (f32x16)(b & 0xffff0000u);
#endif
}

// The numbers rounded to bfloat16, in the lower halves.
inline u32x16 bf16_bits(f32x16 x) {
#if defined(__AVX512BF16__)
    return (u32x16)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    bf16 half[LANES];
    store(half, x);
    u16x16 bits;
    std::memcpy(&bits, half, sizeof bits);
    return __builtin_convertvector(bits, u32x16);
#endif
}

// Sixteen numbers of a row; sixteen cells from the numbers of as many rows as a cell holds.
inline void store_row(float* to, f32x16 x) { store(to, x); }
inline void store_row(bf16* to, f32x16 x) {
    const u16x16 bits = __builtin_convertvector(bf16_bits(x), u16x16);
    std::memcpy(to, &bits, sizeof bits);
}
inline void store_cells(float* to, const f32x16* x) { store(to, x[0]); }
inline void store_cells(uint32_t* to, const f32x16* x) {
    const u32x16 pairs = bf16_bits(x[0]) | bf16_bits(x[1]) << 16;
    std::memcpy(to, &pairs, sizeof pairs);
}

// at(i) is where the `size` numbers of row i begin.
template <class T, class At> void pack_rows(At at, int64_t count, int64_t size, Cell<T>* to) {
    const int64_t row = cells<T>(size);
    for (int64_t i = 0; i < count; i++) {
        to[i * row + row - 1] = 0;
        std::memcpy(to + i * row, at(i), size_t(size) * sizeof(T));
    }
}

template <class T, class At> void pack_panels(At at, int64_t count, int64_t size, Cell<T>* to) {
    const int64_t row = cells<T>(size);
    for (int64_t first = 0; first < count; first += PANEL_ROWS, to += row * PANEL_ROWS) {
        const int64_t rows = std::min(PANEL_ROWS, count - first), end = whole_lanes(rows);
        for (int64_t strip = 0; strip < row; strip += LANES) {  // few cache lines at a time
            const int64_t stop = std::min<int64_t>(row, strip + LANES), whole = std::min(stop, size / PER_CELL<T>);
            for (int64_t i = 0; i < rows; i++) {
                const T* from = at(first + i);
                for (int64_t c = strip; c < whole; c++) std::memcpy(to + c * PANEL_ROWS + i, from + c * PER_CELL<T>, sizeof *to);
                for (int64_t c = whole; c < stop; c++) {
                    to[c * PANEL_ROWS + i] = 0;
                    std::memcpy(to + c * PANEL_ROWS + i, from + c * PER_CELL<T>, sizeof(T));
                }
            }
            for (int64_t c = strip; c < stop; c++) std::fill(to + c * PANEL_ROWS + rows, to + c * PANEL_ROWS + end, Cell<T>(0));
        }
    }
}

inline float cell_of(const float* first, const float*, int64_t d) { return first[d]; }
inline uint32_t cell_of(const bf16* first, const bf16* second, int64_t d) {
    return uint32_t(first[d].bits) | (second ? uint32_t(second[d].bits) << 16 : 0u);
}

// Pairs of rows lie `stride` cells apart, which whole lanes of them fit into.
template <class T, class At> void pack_pairs(At at, int64_t count, int64_t size, Cell<T>* to, int64_t stride) {
    const int64_t end = whole_lanes(size);
    for (int64_t i = 0; i < count; i += PER_CELL<T>, to += stride) {
        const T *first = at(i), *second = PER_CELL<T> > 1 && i + 1 < count ? at(i + 1) : nullptr;
        if (second)
            for (int64_t d = 0; d < size; d++) to[d] = cell_of(first, second, d);
        else
            for (int64_t d = 0; d < size; d++) to[d] = cell_of(first, nullptr, d);
        for (int64_t d = size; d < end; d++) to[d] = 0;
    }
}

template <class T, class At> void pack_pairs(At at, int64_t count, int64_t size, Cell<T>* to) {
    pack_pairs<T>(at, count, size, to, whole_lanes(size));
}

}  // namespace kitae
