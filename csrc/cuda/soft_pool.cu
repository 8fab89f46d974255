#include "generic.h"
#include "soft_pool.h"
#include "tile.h"
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

// The block of a GPU, see tile.h.
class Block {
 public:
  // The largest of a value that each thread has.
  template <typename A>
  struct Largest {
    A value;
    __device__ A operator[](int32_t) const { return value; }
  };
  template <typename A, typename Value>
  __device__ Largest<A> max(int log2_lanes, const Value& value_of) const {
    __shared__ A partial[max_warps << max_log2_lanes];
    const int lanes = 1 << log2_lanes, thread = threadIdx.x % 32, warp = threadIdx.x / 32;
    const A value = max_of_warp(lanes, value_of(static_cast<int32_t>(threadIdx.x)));
    if (thread < lanes) {
      partial[warp * lanes + thread] = value;
    }
    __syncthreads();
    A largest = value;
    MMSOFTPOOL_UNROLL
    for (int i = 0; i < max_warps << max_log2_lanes; i += 32) {
      if (i + thread < static_cast<int>(blockDim.x) / 32 * lanes) {
        largest = fmax(largest, partial[i + thread]);
      }
    }
    return {max_of_warp(lanes, largest)};
  }

  template <typename Run>
  __device__ void each(const Run& run) const {
    run(static_cast<int32_t>(threadIdx.x));
    __syncthreads();
  }
  template <typename Is>
  __device__ bool any(const Is& is) const {
    return __syncthreads_or(is(static_cast<int32_t>(threadIdx.x))) != 0;
  }

 private:
  static constexpr int max_warps = 8, max_log2_lanes = 3;

  // Of the threads whose number is the same modulo `lanes`.
  template <typename A>
  static __device__ A max_of_warp(int lanes, A value) {
    MMSOFTPOOL_UNROLL
    for (int offset = 16; offset > 0; offset /= 2) {
      if (offset >= lanes) {
        value = fmax(value, __shfl_xor_sync(0xffffffffu, value, offset));
      }
    }
    return value;
  }
};

template <typename T>
__global__ void __launch_bounds__(Tile<T, false>::max_threads) forward_tile_kernel(
    typename Tile<T, false>::Arguments a, const T* __restrict__ input, T* __restrict__ output) {
  extern __shared__ double2 shared[];
  Tile<T, false>::forward(
      Block(), a, input, output, reinterpret_cast<Pair<Compute<T>>*>(shared), blockIdx.x,
      blockIdx.y, blockIdx.z);
}

template <typename T>
__global__ void __launch_bounds__(Tile<T, true>::max_threads) backward_tile_kernel(
    typename Tile<T, true>::Arguments a, const T* __restrict__ grad_output,
    const T* __restrict__ input, T* __restrict__ grad_input) {
  extern __shared__ double2 shared[];
  Tile<T, true>::backward(
      Block(), a, grad_output, input, grad_input, reinterpret_cast<Pair<Compute<T>>*>(shared),
      blockIdx.x, blockIdx.y, blockIdx.z);
}

// Launches a block for each tile.
template <typename Arguments, typename... Pointers>
cudaError_t launch_tiles(
    void (*kernel)(Arguments, Pointers...), cudaStream_t stream, const Arguments& arguments,
    Pointers... pointers) {
  const int bytes = static_cast<int>(arguments.shared());
  if (bytes > 48 << 10) {
    const auto error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) {
      return error;
    }
  }
  const dim3 grid(
      static_cast<unsigned>(arguments.planes), static_cast<unsigned>(arguments.height.tiles),
      static_cast<unsigned>(arguments.width.tiles));
  kernel<<<grid, static_cast<unsigned>(arguments.threads), bytes, stream>>>(arguments, pointers...);
  return cudaGetLastError();
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
  if (launched || with_tile<T, false>(pooling, [&](const auto& arguments) {
        error = launch_tiles(forward_tile_kernel<T>, stream, arguments, input, output);
      })) {
    return error;
  }
  return with_indices(pooling, [&](const auto& indices) {
    return launch(
        forward_generic_kernel<T, IntOf<decltype(indices)>>, outputs, stream, indices,
        make_exponent<Compute<T>>(pooling), input, output);
  });
}

template <typename T>
int64_t backward_workspace(
    const Pooling& pooling, const T* grad_output, const T* input, const T* grad_input) {
  const bool aligned = are_aligned(grad_output, input, grad_input);
  const bool has_strip = with_strip<T, true>(pooling, aligned, [](auto) {});
  const bool has_kernel = has_strip || with_tile<T, true>(pooling, [](const auto&) {});
  return has_kernel ? 0 : 3 * pooling.planes() * pooling.out_plane();
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
  if (launched || with_tile<T, true>(pooling, [&](const auto& arguments) {
        error = launch_tiles(
            backward_tile_kernel<T>, stream, arguments, grad_output, input, grad_input);
      })) {
    return error;
  }
  const auto exponent = make_exponent<Compute<T>>(pooling);
  return with_indices(pooling, [&](const auto& indices) {
    using Int = IntOf<decltype(indices)>;
    const cudaError_t first = launch(
        summarize_window_kernel<T, Int>, pooling.planes() * pooling.out_plane(), stream, indices,
        exponent, grad_output, input, workspace);
    return first != cudaSuccess
               ? first
               : launch(
                     backward_generic_kernel<T, Int>, inputs, stream, indices, exponent,
                     static_cast<const Compute<T>*>(workspace), input, grad_input);
  });
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
