// One library for every x86-64: kernels are compiled once per instruction set, and the widest that
// the machine has is taken at run time. Elsewhere 16 bytes are what every machine has.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "softmax.h"

namespace mmsoftpool::cpu {

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

// Calls run(std::integral_constant<int, Bytes>), an MMSOFTPOOL_INLINE_LAMBDA, compiled for vectors
// of that size.
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

// The entry points of a kernel, from the functions forward and backward of its source file.
#define MMSOFTPOOL_DEFINE_KERNEL(name)                                                           \
  template <typename T>                                                                          \
  void forward_##name(                                                                           \
      const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {           \
    with_vectors(vector_bytes<T>(pooling), [&](auto bytes) MMSOFTPOOL_INLINE_LAMBDA {            \
      forward<bytes.value>(pooling, input, output, begin, end);                                  \
    });                                                                                          \
  }                                                                                              \
  template <typename T>                                                                          \
  void backward_##name(                                                                          \
      const Pooling& pooling, int64_t channel_block, const T* grad_output, const T* input,       \
      T* grad_input, int64_t begin, int64_t end) {                                               \
    with_vectors(vector_bytes<T>(pooling), [&](auto bytes) MMSOFTPOOL_INLINE_LAMBDA {            \
      backward<bytes.value>(pooling, channel_block, grad_output, input, grad_input, begin, end); \
    });                                                                                          \
  }
#define MMSOFTPOOL_INSTANTIATE_KERNEL(name, T)                                  \
  template void forward_##name(const Pooling&, const T*, T*, int64_t, int64_t); \
  template void backward_##name(const Pooling&, int64_t, const T*, const T*, T*, int64_t, int64_t);

}  // namespace mmsoftpool::cpu
