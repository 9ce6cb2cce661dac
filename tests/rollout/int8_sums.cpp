// The sums of 8-bit products as integers, and what a layer makes of them: for test_int8.py.
#include "../../kitae/rollout/kernels/product.h"

using namespace kitae;

extern "C" {

// integers[rows][size] and scales[rows] of x[rows][size], and sums[rows][columns] of them and the matrix.
void test_sums(
    const Matrix* matrix, const float* x, int64_t size, int64_t rows, uint8_t* integers, float* scales, int32_t* sums) {
    constexpr int most = Packing<uint8_t>::rows;
    for (int64_t row = 0; row < rows; row++) scales[row] = quantise_row(x + row * size, size, integers + row * size);
    for (int64_t block = 0; block < matrix->columns / BLOCK; block++) {
        const int8_t* weights = static_cast<const int8_t*>(matrix->weights) + block * matrix->depth * BLOCK;
        for (int64_t row = 0; row < rows; row += most) {
            const int64_t count = rows - row < most ? rows - row : most;
            int32_t own[most * BLOCK];
            tile_of<uint8_t>(int(count), integers + row * size, size, weights, matrix->depth, own, {nullptr, 0});
            for (int64_t r = 0; r < count; r++)
                std::memcpy(sums + (row + r) * matrix->columns + block * BLOCK, own + r * BLOCK, BLOCK * sizeof(int32_t));
        }
    }
}

// out[rows][columns] = x * matrix, as a layer computes it.
void test_product(
    const Matrix* matrix, const float* x, int64_t size, int64_t rows, uint8_t* integers, float* scales, float* out,
    int threads) {
    Scratch scratch{};
    scratch.integers = integers;
    scratch.row_scales = scales;
    Course course(2);
#pragma omp parallel num_threads(threads)
    multiply(
        Team(threads, course), scratch, x, size, rows, *matrix, [&](int64_t row, int64_t block, const float* numbers) {
            std::memcpy(out + row * matrix->columns + block * BLOCK, numbers, BLOCK * sizeof(float));
        });
}

}
