// SoftPool on the CPU; softmax.h has the formula. Plain pointers, no torch: the caller allocates
// and parallelises.
#pragma once

#include "../pooling.h"
#include "simd.h"

namespace mmsoftpool::cpu {

// The instruction set that the kernels run on; baseline is what every machine of its kind has.
enum class Capability { baseline, avx2, avx512 };

Capability capability();

// The work comes in independent items, which the caller hands out in ranges [begin, end). What an
// item computes does not depend on the range that it is in, so neither do the results.
// T is float, double, Half or BFloat16.

int64_t forward_items(const Pooling& pooling);  // rows of outputs

template <typename T>
void pool_forward(const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end);

// How many channels the backward takes together, channels last: whole cache lines of them are
// fastest, as long as every thread gets an item. A multiple of all vector lengths.
int64_t channel_block(const Pooling& pooling, int64_t threads);

// Planes, or blocks of channels of one image.
int64_t backward_items(const Pooling& pooling, int64_t channel_block);

// Writes all of grad_input that belongs to the items.
template <typename T>
void pool_backward(
    const Pooling& pooling, int64_t channel_block, const T* grad_output, const T* input,
    T* grad_input, int64_t begin, int64_t end);

}  // namespace mmsoftpool::cpu
