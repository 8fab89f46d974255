#include "generic.h"
#include "ring.h"
#include "soft_pool.h"
#include "with_strip.h"

namespace mmsoftpool::cuda {
namespace {

constexpr int block_size = 128;  // small: a thread that walks down a strip uses many registers

template <typename T, typename Int>
__global__ void forward_generic_kernel(
    Indices<Int> indices, Exponent<Compute<T>> exponent, const T* input, T* output, Int threads) {
  const Int i = Int(blockIdx.x) * block_size + Int(threadIdx.x);
  if (i < threads) {
    forward_generic(indices, exponent, input, output, i);
  }
}

template <typename T, typename Int>
__global__ void summarize_slice_kernel(
    Indices<Int> indices, Exponent<Compute<T>> exponent, const T* input, Compute<T>* workspace,
    Int outputs, Int slices, Int threads) {
  const Int i = Int(blockIdx.x) * block_size + Int(threadIdx.x);
  if (i < threads) {
    summarize_slice(indices, exponent, input, workspace, outputs, slices, i);
  }
}

template <typename T>
__global__ void forward_slices_kernel(
    Exponent<Compute<T>> exponent, const Compute<T>* workspace, T* output, int64_t slices,
    int64_t threads) {
  const int64_t i = int64_t(blockIdx.x) * block_size + threadIdx.x;
  if (i < threads) {
    forward_of_slices(exponent, workspace, output, slices, i);
  }
}

template <typename T>
__global__ void summarize_slices_kernel(
    Exponent<Compute<T>> exponent, const T* grad_output, const Compute<T>* slices_of_windows,
    Compute<T>* workspace, int64_t slices, int64_t threads) {
  const int64_t i = int64_t(blockIdx.x) * block_size + threadIdx.x;
  if (i < threads) {
    summarize_slices(exponent, grad_output, slices_of_windows, workspace, slices, i);
  }
}

template <typename T, typename Int>
__global__ void summarize_window_kernel(
    Indices<Int> indices, Exponent<Compute<T>> exponent, const T* grad_output, const T* input,
    Compute<T>* workspace, Int threads) {
  const Int i = Int(blockIdx.x) * block_size + Int(threadIdx.x);
  if (i < threads) {
    summarize_window(indices, exponent, grad_output, input, workspace, i);
  }
}

template <typename T, typename Int>
__global__ void backward_generic_kernel(
    Indices<Int> indices, Exponent<Compute<T>> exponent, const Compute<T>* workspace,
    const T* input, T* grad_input, Int threads) {
  const Int i = Int(blockIdx.x) * block_size + Int(threadIdx.x);
  if (i < threads) {
    backward_generic(indices, exponent, workspace, input, grad_input, i);
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

template <typename R, typename T>
__global__ void forward_ring_kernel(
    typename R::Arguments a, const T* __restrict__ input, T* output, uint32_t threads) {
  const uint32_t i = blockIdx.x * block_size + threadIdx.x;
  if (i < threads) {
    with_access(R(), a, i, [&](auto ring) { ring.forward(a, input, output, i); });
  }
}

template <typename R, typename T>
__global__ void summarize_ring_kernel(
    typename R::Arguments a, const T* __restrict__ grad_output, const T* __restrict__ input,
    float* workspace, uint32_t threads) {
  const uint32_t i = blockIdx.x * block_size + threadIdx.x;
  if (i < threads) {
    with_access(R(), a, i, [&](auto ring) { ring.summarize(a, grad_output, input, workspace, i); });
  }
}

// From: float, the workspace, or T, the gradient of the output, for K = 3.
template <typename R, typename From, typename T>
__global__ void backward_ring_kernel(
    typename R::Arguments a, const From* __restrict__ from, const T* __restrict__ input,
    T* grad_input, uint32_t threads) {
  const uint32_t i = blockIdx.x * block_size + threadIdx.x;
  if (i < threads) {
    with_access(R(), a, i, [&](auto ring) {
      if constexpr (R::kernel_size == 3) {
        ring.backward_at_once(a, from, input, grad_input, i);
      } else {
        ring.backward(a, from, input, grad_input, i);
      }
    });
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
  return cudaGetLastError();  // and the runtime forgets it
}

template <typename IndicesOfInt>
using IntOf = decltype(std::decay_t<IndicesOfInt>::channels);

// Calls run(indices) with 32-bit numbers if they suffice.
template <typename Run>
cudaError_t with_indices(const Pooling& pooling, const Run& run) {
  return fits_32_bits(pooling) ? run(Indices<int32_t>(pooling)) : run(Indices<int64_t>(pooling));
}

// Whether all tensors begin where 16 bytes can be moved at once.
template <typename... Pointers>
bool are_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...)) % 16 == 0;
}

}  // namespace

int64_t forward_workspace(const Pooling& pooling) {
  const int64_t slices = count_slices(pooling);
  return slices == 1 ? 0 : 3 * slices * pooling.planes() * pooling.out_plane();
}

template <typename T>
cudaError_t pool_forward(
    const Pooling& pooling, const T* input, T* output, Compute<T>* workspace, cudaStream_t stream) {
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
  if (launched || with_ring<T>(pooling, aligned, [&](auto ring) {
        using R = decltype(ring);
        const auto arguments = R::Arguments::of(pooling);
        error =
            launch(forward_ring_kernel<R, T>, arguments.threads, stream, arguments, input, output);
      })) {
    return error;
  }
  const auto exponent = make_exponent<Compute<T>>(pooling);
  const int64_t slices = count_slices(pooling);
  return with_indices(pooling, [&](const auto& indices) {
    using Int = IntOf<decltype(indices)>;
    if (slices == 1) {
      return launch(
          forward_generic_kernel<T, Int>, outputs, stream, indices, exponent, input, output);
    }
    const cudaError_t first = launch(
        summarize_slice_kernel<T, Int>, outputs * slices, stream, indices, exponent, input,
        workspace, Int(outputs), Int(slices));
    return first != cudaSuccess ? first
                                : launch(
                                      forward_slices_kernel<T>, outputs, stream, exponent,
                                      static_cast<const Compute<T>*>(workspace), output, slices);
  });
}

namespace {

// How many images, or planes if the tensor is contiguous, a ring's backward does at once: so many
// that the workspace of the windows stays in the GPU's cache.
int64_t ring_batch(const Pooling& pooling) {
  constexpr int64_t outputs = 1 << 21;
  const int64_t step = pooling.layout == Layout::channels_last ? pooling.channels : 1;
  return std::max<int64_t>(1, outputs / (pooling.out_plane() * step));
}

// The backward of a ring with two steps.
template <typename R, typename T>
cudaError_t backward_in_steps(
    Pooling pooling, const T* grad_output, const T* input, T* grad_input, float* workspace,
    cudaStream_t stream) {
  int64_t rest = pooling.batch;
  if (pooling.layout == Layout::contiguous) {
    rest = pooling.planes();
    pooling.channels = 1;
  }
  const int64_t batch = ring_batch(pooling);
  for (; rest > 0; rest -= batch) {
    pooling.batch = std::min(batch, rest);
    const auto arguments = R::Arguments::of(pooling);
    cudaError_t error = launch(
        summarize_ring_kernel<R, T>, arguments.threads, stream, arguments, grad_output, input,
        workspace);
    if (error == cudaSuccess) {
      error = launch(
          backward_ring_kernel<R, float, T>, arguments.threads, stream, arguments,
          static_cast<const float*>(workspace), input, grad_input);
    }
    if (error != cudaSuccess) {
      return error;
    }
    grad_output += arguments.outputs;
    input += pooling.planes() * pooling.in_plane();
    grad_input += pooling.planes() * pooling.in_plane();
  }
  return cudaSuccess;
}

}  // namespace

template <typename T>
int64_t backward_workspace(
    const Pooling& pooling, const T* grad_output, const T* input, const T* grad_input) {
  const bool aligned = are_aligned(grad_output, input, grad_input);
  const int64_t outputs = pooling.planes() * pooling.out_plane();
  int64_t numbers = 0;
  const bool has_kernel =
      with_strip<T, true>(pooling, aligned, [](auto) {}) ||
      with_ring<T>(pooling, aligned, [&](auto ring) {
        if (decltype(ring)::kernel_size > 3) {
          const int64_t step = pooling.layout == Layout::channels_last ? pooling.channels : 1;
          numbers = 4 * std::min(outputs, ring_batch(pooling) * step * pooling.out_plane());
        }
      });
  return has_kernel ? numbers : 3 * outputs + forward_workspace(pooling);
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
  if (launched || with_ring<T>(pooling, aligned, [&](auto ring) {
        using R = decltype(ring);
        if constexpr (R::kernel_size == 3) {
          const auto arguments = R::Arguments::of(pooling);
          error = launch(
              backward_ring_kernel<R, T, T>, arguments.threads, stream, arguments, grad_output,
              input, grad_input);
        } else {
          error = backward_in_steps<R>(pooling, grad_output, input, grad_input, workspace, stream);
        }
      })) {
    return error;
  }
  const auto exponent = make_exponent<Compute<T>>(pooling);
  return with_indices(pooling, [&](const auto& indices) {
    using Int = IntOf<decltype(indices)>;
    const int64_t outputs = pooling.planes() * pooling.out_plane(), slices = count_slices(pooling);
    Compute<T>* const slices_of_windows = workspace + 3 * outputs;
    cudaError_t first;
    if (slices == 1) {
      first = launch(
          summarize_window_kernel<T, Int>, outputs, stream, indices, exponent, grad_output, input,
          workspace);
    } else {
      first = launch(
          summarize_slice_kernel<T, Int>, outputs * slices, stream, indices, exponent, input,
          slices_of_windows, Int(outputs), Int(slices));
      if (first == cudaSuccess) {
        first = launch(
            summarize_slices_kernel<T>, outputs, stream, exponent, grad_output,
            static_cast<const Compute<T>*>(slices_of_windows), workspace, slices);
      }
    }
    return first != cudaSuccess
               ? first
               : launch(
                     backward_generic_kernel<T, Int>, inputs, stream, indices, exponent,
                     static_cast<const Compute<T>*>(workspace), input, grad_input);
  });
}

#define MMSOFTPOOL_INSTANTIATE(T)                                                                \
  template cudaError_t pool_forward<T>(const Pooling&, const T*, T*, Compute<T>*, cudaStream_t); \
  template int64_t backward_workspace<T>(const Pooling&, const T*, const T*, const T*);          \
  template cudaError_t pool_backward<T>(                                                         \
      const Pooling&, const T*, const T*, T*, Compute<T>*, cudaStream_t);
MMSOFTPOOL_INSTANTIATE(float)
MMSOFTPOOL_INSTANTIATE(double)
MMSOFTPOOL_INSTANTIATE(__half)
MMSOFTPOOL_INSTANTIATE(__nv_bfloat16)
#undef MMSOFTPOOL_INSTANTIATE

}  // namespace mmsoftpool::cuda
