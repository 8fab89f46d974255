#include "generic.h"
#include "soft_pool.h"
#include "strip.h"

namespace mmsoftpool::cuda {
namespace {

constexpr int block_size = 128;  // small: a thread that walks down a strip uses many registers

template <typename T>
__global__ void forward_generic_kernel(
    Pooling pooling, Exponent<Compute<T>> exponent, const T* input, T* output, int64_t threads) {
  const int64_t i = int64_t(blockIdx.x) * block_size + threadIdx.x;
  if (i < threads) {
    forward_generic(pooling, exponent, input, output, i);
  }
}

template <typename T>
__global__ void summarize_window_kernel(
    Pooling pooling, Exponent<Compute<T>> exponent, const T* grad_output, const T* input,
    Compute<T>* workspace, int64_t threads) {
  const int64_t i = int64_t(blockIdx.x) * block_size + threadIdx.x;
  if (i < threads) {
    summarize_window(pooling, exponent, grad_output, input, workspace, i);
  }
}

template <typename T>
__global__ void backward_generic_kernel(
    Pooling pooling, Exponent<Compute<T>> exponent, const Compute<T>* workspace, const T* input,
    T* grad_input, int64_t threads) {
  const int64_t i = int64_t(blockIdx.x) * block_size + threadIdx.x;
  if (i < threads) {
    backward_generic(pooling, exponent, workspace, input, grad_input, i);
  }
}

template <typename S, typename T>
__global__ void forward_strip_kernel(
    typename S::Arguments a, const T* __restrict__ input, T* __restrict__ output,
    uint32_t threads) {
  const uint32_t i = blockIdx.x * block_size + threadIdx.x;
  if (i < threads) {
    S::forward(a, input, output, i);
  }
}

template <typename S, typename T>
__global__ void backward_strip_kernel(
    typename S::Arguments a, const T* __restrict__ grad_output, const T* __restrict__ input,
    T* __restrict__ grad_input, uint32_t threads) {
  const uint32_t i = blockIdx.x * block_size + threadIdx.x;
  if (i < threads) {
    S::backward(a, grad_output, input, grad_input, i);
  }
}

// Launches threads 0 to `threads` - 1 of a kernel whose last argument is their number.
template <typename Kernel, typename... Arguments>
cudaError_t launch(
    Kernel kernel, int64_t threads, cudaStream_t stream, const Arguments&... arguments) {
  const int64_t blocks = (threads + block_size - 1) / block_size;
  if (blocks > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  kernel<<<unsigned(blocks), block_size, 0, stream>>>(arguments..., threads);
  return cudaGetLastError();
}

// Whether all tensors begin where 16 bytes can be moved at once.
template <typename... Pointers>
bool are_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...)) % 16 == 0;
}

}  // namespace

template <typename T>
cudaError_t pool_forward(const Pooling& pooling, const T* input, T* output, cudaStream_t stream) {
  const int64_t outputs = pooling.planes() * pooling.out_plane();
  if (outputs == 0) {
    return cudaSuccess;
  }
  cudaError_t error = cudaSuccess;
  const bool aligned = are_aligned(input, output);
  const bool launched = with_strip<T, false>(pooling, aligned, [&](auto strip) {
    using S = decltype(strip);
    const int64_t height = pooling.height.out;
    const int64_t rows = strip_rows<S>(S::forward_arguments(pooling, height).threads, height);
    const auto arguments = S::forward_arguments(pooling, rows);
    error = launch(forward_strip_kernel<S, T>, arguments.threads, stream, arguments, input, output);
  });
  if (launched) {
    return error;
  }
  return launch(
      forward_generic_kernel<T>, outputs, stream, pooling, make_exponent<Compute<T>>(pooling),
      input, output);
}

template <typename T>
int64_t backward_workspace(
    const Pooling& pooling, const T* grad_output, const T* input, const T* grad_input) {
  const bool aligned = are_aligned(grad_output, input, grad_input);
  const bool has_strip = with_strip<T, true>(pooling, aligned, [](auto) {});
  return has_strip ? 0 : 3 * pooling.planes() * pooling.out_plane();
}

template <typename T>
cudaError_t pool_backward(
    const Pooling& pooling, const T* grad_output, const T* input, T* grad_input,
    Compute<T>* workspace, cudaStream_t stream) {
  const int64_t inputs = pooling.planes() * pooling.in_plane();
  if (inputs == 0) {
    return cudaSuccess;
  }
  cudaError_t error = cudaSuccess;
  const bool aligned = are_aligned(grad_output, input, grad_input);
  const bool launched = with_strip<T, true>(pooling, aligned, [&](auto strip) {
    using S = decltype(strip);
    const int64_t height = (pooling.height.in + pooling.height.stride - 1) / pooling.height.stride;
    const int64_t rows = strip_rows<S>(S::backward_arguments(pooling, height).threads, height);
    const auto arguments = S::backward_arguments(pooling, rows);
    error = launch(
        backward_strip_kernel<S, T>, arguments.threads, stream, arguments, grad_output, input,
        grad_input);
  });
  if (launched) {
    return error;
  }
  const auto exponent = make_exponent<Compute<T>>(pooling);
  error = launch(
      summarize_window_kernel<T>, pooling.planes() * pooling.out_plane(), stream, pooling, exponent,
      grad_output, input, workspace);
  if (error != cudaSuccess) {
    return error;
  }
  return launch(
      backward_generic_kernel<T>, inputs, stream, pooling, exponent,
      static_cast<const Compute<T>*>(workspace), input, grad_input);
}

#define MMSOFTPOOL_INSTANTIATE(T)                                                       \
  template cudaError_t pool_forward<T>(const Pooling&, const T*, T*, cudaStream_t);     \
  template int64_t backward_workspace<T>(const Pooling&, const T*, const T*, const T*); \
  template cudaError_t pool_backward<T>(                                                \
      const Pooling&, const T*, const T*, T*, Compute<T>*, cudaStream_t);
MMSOFTPOOL_INSTANTIATE(float)
MMSOFTPOOL_INSTANTIATE(double)
MMSOFTPOOL_INSTANTIATE(__half)
MMSOFTPOOL_INSTANTIATE(__nv_bfloat16)
#undef MMSOFTPOOL_INSTANTIATE

}  // namespace mmsoftpool::cuda
