// SoftPool on CUDA. Device pointers and a stream, no torch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../pooling.h"
#include "window.h"

namespace mmsoftpool::cuda {

// T is float, double, __half or __nv_bfloat16. The work is queued on `stream` of the current
// device; the functions return the error of the launch. A workspace is aligned to 32 bytes, as
// every tensor that torch allocates is.

// How many numbers of type Compute<T> the workspace of pool_forward has: 0 but for windows of very
// many taps.
int64_t forward_workspace(const Pooling& pooling);

template <typename T>
cudaError_t pool_forward(
    const Pooling& pooling, const T* input, T* output, Compute<T>* workspace, cudaStream_t stream);

// How many numbers of type Compute<T> the workspace of pool_backward has: none where one kernel
// does it all, three for each output (and three for each slice of a divided window), or four for
// each output of a part of the batch.
template <typename T>
int64_t backward_workspace(
    const Pooling& pooling, const T* grad_output, const T* input, const T* grad_input);

template <typename T>
cudaError_t pool_backward(
    const Pooling& pooling, const T* grad_output, const T* input, T* grad_input,
    Compute<T>* workspace, cudaStream_t stream);

}  // namespace mmsoftpool::cuda
