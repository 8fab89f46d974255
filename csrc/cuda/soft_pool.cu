#include "soft_pool.h"
#include "soft_pool_body.h"

namespace mmsoftpool::cuda {
namespace {

constexpr int block_size = 128;  // small: a thread that walks down a strip uses many registers

template <typename T>
__global__ void forward_any_kernel(
    Geometry g, Exponent<Compute<T>> exponent, const T* input, T* output, int64_t threads) {
  const int64_t i = int64_t(blockIdx.x) * block_size + threadIdx.x;
  if (i < threads) {
    forward_any(g, exponent, input, output, i);
  }
}

template <typename T>
__global__ void note_window_kernel(
    Geometry g, Exponent<Compute<T>> exponent, const T* grad_output, const T* input,
    Compute<T>* notes, int64_t threads) {
  const int64_t i = int64_t(blockIdx.x) * block_size + threadIdx.x;
  if (i < threads) {
    note_window(g, exponent, grad_output, input, notes, i);
  }
}

template <typename T>
__global__ void backward_any_kernel(
    Geometry g, Exponent<Compute<T>> exponent, const Compute<T>* notes, const T* input,
    T* grad_input, int64_t threads) {
  const int64_t i = int64_t(blockIdx.x) * block_size + threadIdx.x;
  if (i < threads) {
    backward_any(g, exponent, notes, input, grad_input, i);
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

unsigned blocks(int64_t threads) { return unsigned((threads + block_size - 1) / block_size); }

// Whether all tensors begin where 16 bytes can be moved at once.
template <typename... Pointers>
bool are_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...)) % 16 == 0;
}

// Enough threads to fill any GPU several times over.
constexpr int64_t wanted_threads = 1 << 19;

}  // namespace

template <typename T>
cudaError_t pool_forward(const Geometry& g, const T* input, T* output, cudaStream_t stream) {
  const int64_t outputs = g.planes() * g.out_plane();
  if (outputs == 0) {
    return cudaSuccess;
  }
  const bool aligned = are_aligned(input, output);
  const bool done = with_strip<T>(g, aligned, [&](auto strip) {
    using S = decltype(strip);
    const bool packed = is_packed<T>(g, aligned);
    const int64_t strips = S::forward_arguments(g, g.height.out, packed).threads;
    const int64_t rows = strip_rows(strips, g.height.out, wanted_threads);
    const auto arguments = S::forward_arguments(g, rows, packed);
    const int64_t threads = arguments.threads;
    forward_strip_kernel<S>
        <<<blocks(threads), block_size, 0, stream>>>(arguments, input, output, threads);
  });
  if (!done) {
    forward_any_kernel<<<blocks(outputs), block_size, 0, stream>>>(
        g, make_exponent<Compute<T>>(g), input, output, outputs);
  }
  return cudaGetLastError();
}

template <typename T>
int64_t backward_notes(
    const Geometry& g, const T* grad_output, const T* input, const T* grad_input) {
  const bool aligned = are_aligned(grad_output, input, grad_input);
  return with_strip<T>(g, aligned, [](auto) {}) ? 0 : 3 * g.planes() * g.out_plane();
}

template <typename T>
cudaError_t pool_backward(
    const Geometry& g, const T* grad_output, const T* input, T* grad_input, Compute<T>* notes,
    cudaStream_t stream) {
  const int64_t inputs = g.planes() * g.in_plane();
  if (inputs == 0) {
    return cudaSuccess;
  }
  const bool aligned = are_aligned(grad_output, input, grad_input);
  const bool done = with_strip<T>(g, aligned, [&](auto strip) {
    using S = decltype(strip);
    const bool packed = is_packed<T>(g, aligned);
    const int64_t height = (g.height.in + 1) / 2;
    const int64_t strips = S::backward_arguments(g, height, packed).threads;
    const int64_t rows = strip_rows(strips, height, wanted_threads);
    const auto arguments = S::backward_arguments(g, rows, packed);
    const int64_t threads = arguments.threads;
    backward_strip_kernel<S><<<blocks(threads), block_size, 0, stream>>>(
        arguments, grad_output, input, grad_input, threads);
  });
  if (!done) {
    const int64_t outputs = g.planes() * g.out_plane();
    const auto exponent = make_exponent<Compute<T>>(g);
    note_window_kernel<<<blocks(outputs), block_size, 0, stream>>>(
        g, exponent, grad_output, input, notes, outputs);
    backward_any_kernel<<<blocks(inputs), block_size, 0, stream>>>(
        g, exponent, notes, input, grad_input, inputs);
  }
  return cudaGetLastError();
}

#define MMSOFTPOOL_INSTANTIATE(T)                                                    \
  template cudaError_t pool_forward<T>(const Geometry&, const T*, T*, cudaStream_t); \
  template int64_t backward_notes<T>(const Geometry&, const T*, const T*, const T*); \
  template cudaError_t pool_backward<T>(                                             \
      const Geometry&, const T*, const T*, T*, Compute<T>*, cudaStream_t);
MMSOFTPOOL_INSTANTIATE(float)
MMSOFTPOOL_INSTANTIATE(double)
MMSOFTPOOL_INSTANTIATE(__half)
MMSOFTPOOL_INSTANTIATE(__nv_bfloat16)
#undef MMSOFTPOOL_INSTANTIATE

}  // namespace mmsoftpool::cuda
