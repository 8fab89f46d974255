// SoftPool on the CPU. Plain pointers, no torch: the caller allocates and parallelises.
#pragma once

#include "../geometry.h"

namespace mmsoftpool::cpu {

// Both tensors are contiguous (planes, depth, height, width); T is float or double.

// Writes the output rows [begin, end) of geometry.out_rows(). Rows are independent of each other.
template <typename T>
void soft_pool_forward(
    const Geometry& geometry, const T* input, T* output, int64_t begin, int64_t end);

// Writes grad_input for the planes [begin, end). Planes are independent of each other; within one
// the windows are added in a fixed order, so the result does not depend on the number of threads.
template <typename T>
void soft_pool_backward(
    const Geometry& geometry, Gradient gradient, const T* grad_output, const T* input,
    T* grad_input, int64_t begin, int64_t end);

}  // namespace mmsoftpool::cpu
