// Matrix products with packed weights, in tiles of a few rows times 64 columns kept in registers.
//
// A row's sums run over the inputs in order, one after the other, whatever rows share its tile and whichever thread
// computes it: so a row gets the same bits alone and among others.
#pragma once

#include "int8.h"
#include "model.h"
#include "team.h"
#include "vectors.h"

namespace kitae {

constexpr int BLOCK = 64;  // output columns that lie together

// Registers decide how much of a block is accumulated at a time.
#if defined(__AVX512F__)
constexpr int VECTORS = 4;
constexpr int FLOAT_ROWS = 6;
#if defined(__AVX512BF16__)
constexpr int BF16_ROWS = 6;
#else
constexpr int BF16_ROWS = 4;
#endif
#if defined(__AVX512VNNI__)
constexpr int INT8_ROWS = 6;
#else
constexpr int INT8_ROWS = 4;
#endif
#else
constexpr int VECTORS = 2;
constexpr int FLOAT_ROWS = 3;
constexpr int BF16_ROWS = 2;
constexpr int INT8_ROWS = 2;
#endif

template <class T> struct Packing;
template <> struct Packing<float> {
    static constexpr int q = 1, rows = FLOAT_ROWS;
    using Weight = float;
    using Sum = float;
};
template <> struct Packing<bf16> {
    static constexpr int q = 2, rows = BF16_ROWS;
    using Weight = bf16;
    using Sum = float;
};
template <> struct Packing<uint8_t> {
    static constexpr int q = 4, rows = INT8_ROWS;
    using Weight = int8_t;
    using Sum = int32_t;
};

template <class Sum> struct Vector;
template <> struct Vector<float> {
    using type = f32x16;
};
template <> struct Vector<int32_t> {
    using type = i32x16;
};

// sum + x0 * w0 + x1 * w1, where `pair` is the bf16 numbers x0, x1 and each lane of `weights` its own w0, w1.
inline __attribute__((always_inline)) f32x16 add_pairs(f32x16 sum, uint32_t pair, u32x16 weights) {
#if defined(__AVX512BF16__)
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)(pair - u32x16{}));
#else
    // A bf16 becomes a float when it is the upper half of one.
    sum += (f32x16)((pair << 16) - u32x16{}) * (f32x16)(weights << 16);
    return sum + (f32x16)((pair & 0xffff0000u) - u32x16{}) * (f32x16)(weights & 0xffff0000u);
#endif
}

// Cache lines to fetch while a tile is computed: `lines` for each 256 bytes of weights, from `next` on.
struct Prefetch {
    const char* next;
    int lines;

    void step() {
        for (int i = 0; i < lines; i++) __builtin_prefetch(next + i * 64, 0, 2);
        next += lines * 64;
    }
};

// What tile t of a piece fetches, so that memory is read while tiles compute. A tile that may be the first to use its block
// fetches it 4 KiB ahead of itself; the others, the first four of them, the `following` block of so many `bytes`.
inline Prefetch prefetch_of(int64_t t, int64_t tiles, bool is_cold, const void* block, const void* following, int64_t bytes) {
    const char* own = static_cast<const char*>(block);
    if (tiles == 1 || (is_cold && t == 0)) return {own + 4096, 4};
    const int64_t others = tiles - is_cold, shares = others >= 4 ? 4 : others >= 2 ? 2 : 1, share = t - is_cold;
    if (!following || share >= shares) return {own, 0};
    return {static_cast<const char*>(following) + bytes / shares * share, int(4 / shares)};
}

// sums[r][16 v ...] += x[r][q k ...] * w[k][16 v ...] of one k.
template <int ROWS>
inline __attribute__((always_inline)) void add_products(
    f32x16 (&sums)[ROWS][VECTORS], const float* x, int64_t stride, const float* w) {
    f32x16 column[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) column[v] = load(w + v * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
        const f32x16 input = splat(x[r * stride]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[r][v] += input * column[v];
    }
}

template <int ROWS>
inline __attribute__((always_inline)) void add_products(
    f32x16 (&sums)[ROWS][VECTORS], const bf16* x, int64_t stride, const bf16* w) {
    u32x16 column[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) column[v] = load_pairs(w + v * LANES * 2);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
        const uint32_t pair = pair_at(x + r * stride);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[r][v] = add_pairs(sums[r][v], pair, column[v]);
    }
}

template <int ROWS>
inline __attribute__((always_inline)) void add_products(
    i32x16 (&sums)[ROWS][VECTORS], const uint8_t* x, int64_t stride, const int8_t* w) {
    u32x16 column[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) column[v] = load_quads(w + v * LANES * 4);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
        const uint32_t quad = quad_at(x + r * stride);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[r][v] = add_quads(sums[r][v], quad, column[v]);
    }
}

// ROWS rows of x times one block of weights: sums [ROWS][64].
template <int ROWS, class T>
void tile(
    const T* x, int64_t stride, const typename Packing<T>::Weight* block, int64_t depth, typename Packing<T>::Sum* out,
    Prefetch prefetch) {
    constexpr int q = Packing<T>::q;
    for (int first = 0; first < BLOCK; first += VECTORS * LANES) {
        typename Vector<typename Packing<T>::Sum>::type sums[ROWS][VECTORS] = {};
        for (int64_t k = 0; k < depth; k += q) {
            prefetch.step();
            add_products<ROWS>(sums, x + k, stride, block + (k * BLOCK + first * q));
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) store(out + r * BLOCK + first + v * LANES, sums[r][v]);
    }
}

template <class T, int ROWS = Packing<T>::rows>
void tile_of(
    int rows, const T* x, int64_t stride, const typename Packing<T>::Weight* block, int64_t depth,
    typename Packing<T>::Sum* out, Prefetch prefetch) {
    if constexpr (ROWS == 1) {
        tile<1>(x, stride, block, depth, out, prefetch);
    } else if (rows == ROWS) {
        tile<ROWS>(x, stride, block, depth, out, prefetch);
    } else {
        tile_of<T, ROWS - 1>(rows, x, stride, block, depth, out, prefetch);
    }
}

// How many parts the rows are cut into: more where there are few blocks for the threads.
inline int64_t parts_of_rows(int64_t rows, int64_t blocks, int threads) {
    const int64_t wanted = (8 * threads + blocks - 1) / blocks, possible = rows / 12;
    return wanted < possible ? wanted : possible > 1 ? possible : 1;
}

// The rows of one product.
template <class T> struct Rows {
    using Number = T;
    const T* x;
    int64_t stride, count;
    const float* scales;  // [count], of 8-bit integers; else null

    float scale_of(int64_t row) const { return scales ? scales[row] : 1.0f; }
    Rows part(int64_t from, int64_t end) const { return {x + from * stride, stride, end - from, scales ? scales + from : scales}; }
};

// A row's 64 sums from `column` on as numbers: in place, or in `out`.
inline const float* finish(float* sums, const Matrix& matrix, int64_t column, float, float*) {
    if (matrix.bias)
        for (int j = 0; j < BLOCK; j += LANES) store(sums + j, load(sums + j) + load(matrix.bias + column + j));
    return sums;
}

inline const float* finish(const int32_t* sums, const Matrix& matrix, int64_t column, float scale, float* out) {
    for (int j = 0; j < BLOCK; j += LANES) {
        const i32x16 exact = load_integers(sums + j) - load_integers(matrix.offsets + column + j);
        store(out + j, __builtin_convertvector(exact, f32x16) * scale * load(matrix.scales + column + j));
    }
    return finish(out, matrix, column, scale, out);
}

// The same of rows that are what the weights want: float, bf16 or integers.
template <class T, class Use> void multiply_rows(const Team& team, const Rows<T>& rows, const Matrix& matrix, Use use) {
    constexpr int most = Packing<T>::rows;
    using Weight = typename Packing<T>::Weight;
    const int64_t blocks = matrix.columns / BLOCK, parts = parts_of_rows(rows.count, blocks, team.size);
    const int64_t block_size = matrix.depth * BLOCK;
    const int64_t pieces = blocks * parts;
    const auto weights_of = [&](int64_t piece) { return static_cast<const Weight*>(matrix.weights) + piece / parts * block_size; };
    // `next` is the piece that this thread will most likely take after it.
    const auto compute = [&](int64_t piece, int64_t next, bool is_cold) {
        alignas(64) typename Packing<T>::Sum sums[most * BLOCK];
        alignas(64) float numbers[BLOCK];
        const int64_t block = piece / parts, part = piece % parts;
        const int64_t first = rows.count * part / parts, end = rows.count * (part + 1) / parts;
        const int64_t tiles = (end - first + most - 1) / most;
        const Weight* weights = weights_of(piece);
        const Weight* following = next < pieces && next / parts != block ? weights_of(next) : nullptr;
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t from = first + (end - first) * t / tiles, to = first + (end - first) * (t + 1) / tiles;
            const Prefetch prefetch = prefetch_of(t, tiles, is_cold, weights, following, block_size * int64_t(sizeof(Weight)));
            tile_of<T>(int(to - from), rows.x + from * rows.stride, rows.stride, weights, matrix.depth, sums, prefetch);
            for (int64_t row = from; row < to; row++)
                use(row, block, finish(sums + (row - from) * BLOCK, matrix, block * BLOCK, rows.scale_of(row), numbers));
        }
    };
    team.share(pieces, [&](Range work) {
        // Meanwhile the other threads take as many pieces each.
        const int64_t after = work.end + (team.size - 1) * (work.end - work.begin);
        for (int64_t piece = work.begin; piece < work.end; piece++)
            compute(piece, piece + 1 < work.end ? piece + 1 : after, piece == work.begin);
    });
}

// One phase: rows of T as integers of their own scale.
template <class T>
Rows<uint8_t> quantise(const Team& team, const Scratch& scratch, const T* x, int64_t stride, int64_t count, int64_t depth) {
    const int64_t size = (depth + LANES - 1) / LANES * LANES;
    team.share(count, [&](Range mine) {
        for (int64_t row = mine.begin; row < mine.end; row++)
            scratch.row_scales[row] = quantise_row(x + row * stride, size, scratch.integers + row * size);
    });
    return {scratch.integers, size, count, scratch.row_scales};
}

// For each row and block of 64 columns of x * weights + bias, calls use(row, block, sums[64]).
template <class T, class Use>
void multiply(
    const Team& team, const Scratch& scratch, const T* x, int64_t stride, int64_t count, const Matrix& matrix, Use use) {
    if (matrix.scales)
        multiply_rows(team, quantise(team, scratch, x, stride, count, matrix.depth), matrix, use);
    else
        multiply_rows(team, Rows<T>{x, stride, count, nullptr}, matrix, use);
}

}  // namespace kitae
