#include "select.h"
#include "soft_pool.h"

namespace mmsoftpool::cuda {
namespace {

constexpr int block_size = 128;  // small: a thread that walks down a strip uses many registers

// Calls run(kernel, i) for this thread if there is a thread i.
template <typename K, typename Run>
__device__ __forceinline__ void run_thread(const typename K::Arguments& a, const Run& run) {
  using Int = typename K::Int;
  const Int i = Int(blockIdx.x) * block_size + Int(threadIdx.x);
  if (i < Int(a.threads)) {
    with_way(K(), a, i, [&](auto kernel) { run(kernel, i); });
  }
}

template <typename K, typename T>
__global__ void slice_kernel(typename K::Arguments a, const T* __restrict__ input) {
  run_thread<K>(a, [&](auto kernel, auto i) { kernel.summarize_slice(a, input, i); });
}

template <typename K, typename T>
__global__ void forward_kernel(
    typename K::Arguments a, const T* __restrict__ input, T* __restrict__ output) {
  run_thread<K>(a, [&](auto kernel, auto i) { kernel.forward(a, input, output, i); });
}

template <typename K, typename T>
__global__ void summarize_kernel(
    typename K::Arguments a, const T* __restrict__ grad_output, const T* __restrict__ input,
    Compute<T>* __restrict__ workspace) {
  run_thread<K>(
      a, [&](auto kernel, auto i) { kernel.summarize(a, grad_output, input, workspace, i); });
}

// From: Compute<T>, the workspace, or T, the gradient of the output.
template <typename K, typename T, typename From>
__global__ void backward_kernel(
    typename K::Arguments a, const From* __restrict__ from, const T* __restrict__ input,
    T* __restrict__ grad_input) {
  run_thread<K>(a, [&](auto kernel, auto i) { kernel.backward(a, from, input, grad_input, i); });
}

template <typename Kernel, typename Arguments, typename... Pointers>
cudaError_t launch(
    Kernel kernel, cudaStream_t stream, const Arguments& arguments, Pointers... pointers) {
  const int64_t blocks = (arguments.threads + block_size - 1) / block_size;
  if (blocks > INT32_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  kernel<<<unsigned(blocks), block_size, 0, stream>>>(arguments, pointers...);
  return cudaGetLastError();  // and the runtime forgets it
}

// Summarizes the slices of windows, if K has such and they are divided.
template <typename K, typename T>
cudaError_t launch_slices(
    typename K::Arguments& arguments, const T* input, Compute<T>* slices, cudaStream_t stream) {
  if constexpr (K::has_slices) {
    arguments.slices_of_windows = slices;
    if (arguments.slices > 1) {
      auto of_slices = arguments;
      of_slices.threads = int64_t(arguments.outputs) * arguments.slices;
      return launch(slice_kernel<K, T>, stream, of_slices, input);
    }
  }
  return cudaSuccess;
}

// The backward of K, in two steps for so many images at once as K wants.
template <typename K, typename T>
cudaError_t launch_backward(
    Pooling pooling, const T* grad_output, const T* input, T* grad_input, Compute<T>* workspace,
    cudaStream_t stream) {
  if constexpr (!K::two_steps) {
    const auto arguments = K::backward_arguments(pooling);
    return launch(backward_kernel<K, T, T>, stream, arguments, grad_output, input, grad_input);
  } else {
    int64_t rest = pooling.batch;
    const int64_t batch = K::batch(pooling);
    for (; rest > 0; rest -= batch) {
      pooling.batch = std::min(batch, rest);
      auto first = K::forward_arguments(pooling);
      const int64_t outputs = pooling.planes() * pooling.out_plane();
      const int64_t inputs = pooling.planes() * pooling.in_plane();
      cudaError_t error = launch_slices<K>(first, input, workspace + 3 * outputs, stream);
      if (error == cudaSuccess) {
        error = launch(summarize_kernel<K, T>, stream, first, grad_output, input, workspace);
      }
      if (error == cudaSuccess) {
        error = launch(
            backward_kernel<K, T, Compute<T>>, stream, K::backward_arguments(pooling), workspace,
            input, grad_input);
      }
      if (error != cudaSuccess) {
        return error;
      }
      grad_output += outputs;
      input += inputs;
      grad_input += inputs;
    }
    return cudaSuccess;
  }
}

// Planes of a contiguous tensor are as good as images.
Pooling with_planes_as_images(Pooling pooling) {
  if (pooling.layout == Layout::contiguous) {
    pooling.batch = pooling.planes();
    pooling.channels = 1;
  }
  return pooling;
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
  if (pooling.planes() * pooling.out_plane() == 0) {
    return cudaSuccess;
  }
  cudaError_t error = cudaSuccess;
  with_kernel<T, false>(pooling, are_aligned(input, output), [&](auto kernel) {
    using K = decltype(kernel);
    auto arguments = K::forward_arguments(pooling);
    error = launch_slices<K>(arguments, input, workspace, stream);
    if (error == cudaSuccess) {
      error = launch(forward_kernel<K, T>, stream, arguments, input, output);
    }
  });
  return error;
}

template <typename T>
int64_t backward_workspace(
    const Pooling& pooling, const T* grad_output, const T* input, const T* grad_input) {
  int64_t numbers = 0;
  const Pooling images = with_planes_as_images(pooling);
  with_kernel<T, true>(images, are_aligned(grad_output, input, grad_input), [&](auto kernel) {
    using K = decltype(kernel);
    if constexpr (K::two_steps) {
      Pooling part = images;
      part.batch = std::min(part.batch, K::batch(images));
      numbers = K::workspace(part) + (K::has_slices ? forward_workspace(part) : 0);
    }
  });
  return numbers;
}

template <typename T>
cudaError_t pool_backward(
    const Pooling& pooling, const T* grad_output, const T* input, T* grad_input,
    Compute<T>* workspace, cudaStream_t stream) {
  if (pooling.planes() * pooling.in_plane() == 0) {
    return cudaSuccess;
  }
  cudaError_t error = cudaSuccess;
  const Pooling images = with_planes_as_images(pooling);
  with_kernel<T, true>(images, are_aligned(grad_output, input, grad_input), [&](auto kernel) {
    using K = decltype(kernel);
    error = launch_backward<K>(images, grad_output, input, grad_input, workspace, stream);
  });
  return error;
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
