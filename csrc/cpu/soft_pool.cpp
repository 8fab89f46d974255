#include "soft_pool.h"

#include <cstdlib>
#include <string>

#include "channels_last.h"
#include "channels_last_shared.h"
#include "contiguous.h"
#include "contiguous_shared.h"
#include "one_window.h"

namespace mmsoftpool::cpu {
namespace {

// Whether windows share one exponential for each input. That saves time where an input is in
// several windows of many taps; the windows of 2 x 2 and of 3 x 3 at stride 2 that networks have
// are faster with one for each tap, which the compiler unrolls. The limits are those of
// measurements.
template <typename T>
bool shares_powers(const Pooling& pooling, bool backward) {
  const bool last = pooling.layout == Layout::channels_last;
  const int64_t taps = pooling.taps();
  const double windows_of_an_input =
      double(taps) * double(pooling.out_plane()) / double(pooling.in_plane());
  return !std::is_same_v<T, double> && Powers<Simd<float, 16>>::fits(pooling) &&
         taps >= (last && !backward ? 9 : 16) && windows_of_an_input >= (last && backward ? 6 : 4);
}

// Whether a vector of one window's taps takes less time than a vector of windows, contiguous. In
// instructions: about 20 a vector of taps, and 100 to gather a window and to merge its lanes.
template <int Bytes, typename T>
MMSOFTPOOL_INLINE bool use_one_window(const Pooling& pooling) {
  constexpr int64_t lanes = Bytes / sizeof(Compute<T>);
  const auto vectors = [](int64_t n) { return (n + lanes - 1) / lanes; };
  const int64_t taps = pooling.taps(), windows = pooling.width.out;
  return taps >= lanes && windows * (20 * vectors(taps) + 100) < vectors(windows) * 20 * taps;
}

template <int Bytes, typename T>
MMSOFTPOOL_INLINE void forward(
    const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  if (pooling.layout == Layout::contiguous) {
    if (shares_powers<T>(pooling, false)) {
      if constexpr (!std::is_same_v<T, double>) {
        forward_contiguous_shared<Bytes>(pooling, input, output, begin, end);
      }
    } else if (use_one_window<Bytes, T>(pooling)) {
      forward_one_window<Bytes>(pooling, input, output, begin, end);
    } else {
      forward_contiguous<Bytes>(pooling, input, output, begin, end);
    }
  } else if (shares_powers<T>(pooling, false)) {
    if constexpr (!std::is_same_v<T, double>) {
      forward_channels_last_shared<Bytes>(pooling, input, output, begin, end);
    }
  } else {
    forward_channels_last<Bytes>(pooling, input, output, begin, end);
  }
}

template <int Bytes, typename T>
MMSOFTPOOL_INLINE void backward(
    const Pooling& pooling, int64_t channel_block, const T* grad_output, const T* input,
    T* grad_input, int64_t begin, int64_t end) {
  if (pooling.layout == Layout::contiguous) {
    if (shares_powers<T>(pooling, true)) {
      if constexpr (!std::is_same_v<T, double>) {
        backward_contiguous_shared<Bytes>(pooling, grad_output, input, grad_input, begin, end);
      }
    } else if (use_one_window<Bytes, T>(pooling)) {
      backward_one_window<Bytes>(pooling, grad_output, input, grad_input, begin, end);
    } else {
      backward_contiguous<Bytes>(pooling, grad_output, input, grad_input, begin, end);
    }
  } else if (shares_powers<T>(pooling, true)) {
    if constexpr (!std::is_same_v<T, double>) {
      backward_channels_last_shared<Bytes>(
          pooling, channel_block, grad_output, input, grad_input, begin, end);
    }
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

namespace {

// The instruction set for these arguments: any alpha works on the baseline's vectors alone.
template <typename T>
Capability capability_for(const Pooling& pooling) {
  return needs_any_alpha<Compute<T>>(pooling) && !std::is_same_v<T, double> ? Capability::baseline
                                                                            : capability();
}

}  // namespace

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
  switch (capability_for<T>(pooling)) {
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
  switch (capability_for<T>(pooling)) {
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
