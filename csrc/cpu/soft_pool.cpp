#include "soft_pool.h"

#include <cstdlib>
#include <string>

#include "channels_last.h"
#include "contiguous.h"

namespace mmsoftpool::cpu {
namespace {

template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  if (pooling.layout == Layout::contiguous) {
    forward_contiguous<Bytes>(pooling, input, output, begin, end);
  } else {
    forward_channels_last<Bytes>(pooling, input, output, begin, end);
  }
}

template <int Bytes, typename T>
MMSOFTPOOL_INLINE void backward(
    const Pooling& pooling, int64_t channel_block, const T* grad_output, const T* input,
    T* grad_input, int64_t begin, int64_t end) {
  if (pooling.layout == Layout::contiguous) {
    backward_contiguous<Bytes>(pooling, grad_output, input, grad_input, begin, end);
  } else {
    backward_channels_last<Bytes>(
        pooling, channel_block, grad_output, input, grad_input, begin, end);
  }
}

// One library for every x86-64: the code above is compiled once per instruction set, and the widest
// that the machine has is taken at run time. Elsewhere 16 bytes are what every machine has.
#if defined(__x86_64__)
#define MMSOFTPOOL_AVX2 __attribute__((target("avx2,fma")))
#define MMSOFTPOOL_AVX512 \
  __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))

template <typename T>
MMSOFTPOOL_AVX2 void forward_avx2(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  forward<32>(pooling, input, output, begin, end);
}
template <typename T>
MMSOFTPOOL_AVX512 void forward_avx512(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  forward<64>(pooling, input, output, begin, end);
}
template <typename T>
MMSOFTPOOL_AVX2 void backward_avx2(
    const Pooling& pooling, int64_t channel_block, const T* grad_output, const T* input,
    T* grad_input, int64_t begin, int64_t end) {
  backward<32>(pooling, channel_block, grad_output, input, grad_input, begin, end);
}
template <typename T>
MMSOFTPOOL_AVX512 void backward_avx512(
    const Pooling& pooling, int64_t channel_block, const T* grad_output, const T* input,
    T* grad_input, int64_t begin, int64_t end) {
  backward<64>(pooling, channel_block, grad_output, input, grad_input, begin, end);
}

// The widest instruction set that the machine has and that ATEN_CPU_CAPABILITY allows, the variable
// which holds torch's own kernels. As in torch, an unknown value counts for nothing; torch warns.
Capability find_capability() {
  const char* const variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string limit = variable != nullptr ? variable : "";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (limit == "default" || !has_avx2) {
    return Capability::baseline;
  }
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return limit == "avx2" || !has_avx512 ? Capability::avx2 : Capability::avx512;
}
#else
Capability find_capability() { return Capability::baseline; }
#endif

}  // namespace

Capability capability() {
  static const Capability found = find_capability();
  return found;
}

int64_t forward_items(const Pooling& pooling) {
  const int64_t rows = pooling.depth.out * pooling.height.out;
  return pooling.layout == Layout::contiguous ? pooling.planes() * rows : pooling.batch * rows;
}

int64_t channel_block(const Pooling& pooling, int64_t threads) {
  const int64_t wide = 64;
  return pooling.batch * ((pooling.channels + wide - 1) / wide) >= threads ? wide : 16;
}

int64_t backward_items(const Pooling& pooling, int64_t channel_block) {
  const int64_t blocks = (pooling.channels + channel_block - 1) / channel_block;
  return pooling.layout == Layout::contiguous ? pooling.planes() : pooling.batch * blocks;
}

template <typename T>
void pool_forward(const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  switch (capability()) {
    case Capability::avx512:
      return forward_avx512(pooling, input, output, begin, end);
    case Capability::avx2:
      return forward_avx2(pooling, input, output, begin, end);
    case Capability::baseline:
      break;
  }
#endif
  forward<16>(pooling, input, output, begin, end);
}

template <typename T>
void pool_backward(
    const Pooling& pooling, int64_t channel_block, const T* grad_output, const T* input,
    T* grad_input, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  switch (capability()) {
    case Capability::avx512:
      return backward_avx512(pooling, channel_block, grad_output, input, grad_input, begin, end);
    case Capability::avx2:
      return backward_avx2(pooling, channel_block, grad_output, input, grad_input, begin, end);
    case Capability::baseline:
      break;
  }
#endif
  backward<16>(pooling, channel_block, grad_output, input, grad_input, begin, end);
}

#define MMSOFTPOOL_INSTANTIATE(T)                                                \
  template void pool_forward<T>(const Pooling&, const T*, T*, int64_t, int64_t); \
  template void pool_backward<T>(const Pooling&, int64_t, const T*, const T*, T*, int64_t, int64_t);
MMSOFTPOOL_INSTANTIATE(float)
MMSOFTPOOL_INSTANTIATE(double)
MMSOFTPOOL_INSTANTIATE(Half)
MMSOFTPOOL_INSTANTIATE(BFloat16)
#undef MMSOFTPOOL_INSTANTIATE

}  // namespace mmsoftpool::cpu
