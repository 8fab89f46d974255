// The kernels that soft_pool.cpp chooses from, one source file each. One library serves every
// x86-64: kernels are compiled once per instruction set, and the widest that the machine has is
// taken at run time. Elsewhere 16 bytes are what every machine has.
#pragma once

#include <type_traits>

#include "soft_pool.h"
#include "softmax.h"

namespace mmsoftpool::cpu {

// The size of the vectors for these arguments: 64, 32 or 16 bytes.
template <typename T>
int64_t vector_bytes(const Pooling& pooling);

// The entry points of a kernel; arguments are those of pool_forward and pool_backward.
template <typename T>
struct Kernel {
  void (*forward)(const Pooling&, const T* input, T* output, int64_t begin, int64_t end);
  void (*backward)(
      const Pooling&, int64_t channel_block, const T* grad_output, const T* input, T* grad_input,
      int64_t begin, int64_t end);
};

template <typename T>
Kernel<T> contiguous_kernel();
template <typename T>
Kernel<T> channels_last_kernel();
template <typename T>
Kernel<T> shared_kernel();  // not for double
template <typename T>
Kernel<T> one_window_kernel();  // only for contiguous tensors
template <typename T>
Kernel<T> adaptive_kernel();  // only for adaptive pooling

// How many planes the kernel for adaptive pooling pools together; a multiple of all vector lengths.
constexpr int64_t planes_side_by_side = 16;

// Whether the taps of every window lie in memory one after the other, contiguous.
inline bool has_one_run(const Pooling& pooling) {
  const auto is_whole = [](const Axis& axis) {
    return axis.out == 1 && axis.padding == 0 && axis.kernel_size == axis.in;
  };
  const auto has_neighbours = [](const Axis& axis) {
    return axis.dilation == 1 || axis.kernel_size == 1;
  };
  const Axis &depth = pooling.depth, &height = pooling.height, &width = pooling.width;
  return has_neighbours(depth) && has_neighbours(height) && has_neighbours(width) &&
         (depth.kernel_size == 1 || is_whole(height)) &&
         (depth.kernel_size * height.kernel_size == 1 || is_whole(width));
}

#if defined(__x86_64__)
#if defined(__clang__)
#define MMSOFTPOOL_FULL_WIDTH ""
#else
#define MMSOFTPOOL_FULL_WIDTH ",prefer-vector-width=512"
#endif

template <typename Run>
__attribute__((target("avx2,fma,f16c"))) void run_avx2(const Run& run) {
  run(std::integral_constant<int, 32>());
}
template <typename Run>
__attribute__((
    target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl" MMSOFTPOOL_FULL_WIDTH))) void
run_avx512(const Run& run) {
  run(std::integral_constant<int, 64>());
}
#endif

// Calls run(std::integral_constant<int, Bytes>), INLINED, compiled for vectors of that size.
template <typename Run>
void with_vectors(int64_t bytes, const Run& run) {
#if defined(__x86_64__)
  if (bytes == 64) {
    return run_avx512(run);
  }
  if (bytes == 32) {
    return run_avx2(run);
  }
#endif
  run(std::integral_constant<int, 16>());
}

// The kernel of a source file from its functions forward and backward, for all types but double.
#define MMSOFTPOOL_DEFINE_KERNEL(name)                                     \
  template <typename T>                                                    \
  Kernel<T> name##_kernel() {                                              \
    return {                                                               \
        [](const Pooling& pooling, auto... arguments) {                    \
          with_vectors(vector_bytes<T>(pooling), [&](auto bytes) INLINED { \
            forward<bytes.value>(pooling, arguments...);                   \
          });                                                              \
        },                                                                 \
        [](const Pooling& pooling, auto... arguments) {                    \
          with_vectors(vector_bytes<T>(pooling), [&](auto bytes) INLINED { \
            backward<bytes.value>(pooling, arguments...);                  \
          });                                                              \
        }};                                                                \
  }                                                                        \
  MMSOFTPOOL_INSTANTIATE_KERNEL(name, float)                               \
  MMSOFTPOOL_INSTANTIATE_KERNEL(name, Half)                                \
  MMSOFTPOOL_INSTANTIATE_KERNEL(name, BFloat16)
#define MMSOFTPOOL_INSTANTIATE_KERNEL(name, T) template Kernel<T> name##_kernel();

}  // namespace mmsoftpool::cpu
