#include "soft_pool.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "dispatch.h"
#include "powers.h"

namespace mmsoftpool::cpu {
namespace {

// Whether windows share one exponential for each input. That saves time where an input is in
// several windows. The limits are those of measurements: the windows of 2 x 2 and of 3 x 3 at
// stride 2 that networks have are faster with an exponential for each tap, which the compiler
// unrolls.
template <typename T>
bool shares_powers(const Pooling& pooling, bool backward) {
  const double windows_of_an_input =
      double(pooling.taps()) * double(pooling.out_plane()) / double(pooling.in_plane());
  const bool often_faster =
      vector_bytes<T>(pooling) == 16 || (pooling.layout == Layout::channels_last && !backward);
  return Powers<Simd<float, 16>>::fits(pooling) && !pooling.is_adaptive() &&
         windows_of_an_input >= (often_faster ? 2.5 : 4.5);
}

// Whether a vector of one window's taps takes less time than a vector of windows, contiguous. In
// instructions: about 20 a vector of taps, and 100 to gather a window and to merge its lanes.
template <typename T>
bool use_one_window(const Pooling& pooling) {
  const int64_t lanes = vector_bytes<T>(pooling) / sizeof(Compute<T>);
  const auto vectors = [=](int64_t n) { return (n + lanes - 1) / lanes; };
  const int64_t taps = pooling.taps(), windows = pooling.width.out;
  return taps >= lanes && windows * (20 * vectors(taps) + 100) < vectors(windows) * 20 * taps;
}

#if defined(__x86_64__)
// Whether the machine has vcvtph2ps, of which __builtin_cpu_supports knows in new compilers only.
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Whether planes are pooled side by side: where there are some, and what a row of windows reaches
// of them fits a cache. A long window in one piece takes less time by itself.
bool use_adaptive(const Pooling& pooling) {
  const Axis& outer = pooling.depth.in * pooling.depth.out > 1 ? pooling.depth : pooling.height;
  const bool last = pooling.layout == Layout::channels_last;
  const bool one_window = !last && pooling.width.out == 1 && pooling.taps() >= 256;
  return pooling.is_adaptive() && !(one_window && has_one_run(pooling)) &&
         (last || pooling.planes() >= planes_side_by_side / 2) &&
         pooling.in_plane() / outer.in * outer.kernel_size <= 1 << (last ? 16 : 14);
}

int64_t adaptive_blocks(const Pooling& pooling) {
  return (pooling.planes() + planes_side_by_side - 1) / planes_side_by_side;
}

template <typename T>
Kernel<T> choose_kernel(const Pooling& pooling, bool backward) {
  if (use_adaptive(pooling)) {
    return adaptive_kernel<T>();
  }
  if constexpr (!std::is_same_v<T, double>) {
    if (shares_powers<T>(pooling, backward)) {
      return shared_kernel<T>();
    }
  }
  if (pooling.layout == Layout::channels_last) {
    return channels_last_kernel<T>();
  }
  return use_one_window<T>(pooling) ? one_window_kernel<T>() : contiguous_kernel<T>();
}

// The widest instruction set that the machine has and that ATEN_CPU_CAPABILITY allows, the variable
// which holds torch's own kernels. As in torch, an unknown value counts for nothing; torch warns.
Capability find_capability() {
#if defined(__x86_64__)
  const char* const variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string limit = variable != nullptr ? variable : "";
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (limit != "default" && has_avx2) {
    return limit == "avx2" || !has_avx512 ? Capability::avx2 : Capability::avx512;
  }
#endif
  return Capability::baseline;
}

}  // namespace

Capability capability() {
  static const Capability found = find_capability();
  return found;
}

template <typename T>
int64_t vector_bytes(const Pooling& pooling) {
  // Any alpha works on the baseline's vectors alone.
  if (!std::is_same_v<T, double> && needs_any_alpha<Compute<T>>(pooling)) {
    return 16;
  }
  switch (capability()) {
    case Capability::avx512:
      return 64;
    case Capability::avx2:
      return 32;
    default:
      return 16;
  }
}

int64_t forward_items(const Pooling& pooling) {
  const int64_t rows = pooling.depth.out * pooling.height.out;
  if (pooling.layout == Layout::contiguous && use_adaptive(pooling)) {
    return adaptive_blocks(pooling) * rows;
  }
  return pooling.layout == Layout::contiguous ? pooling.planes() * rows : pooling.batch * rows;
}

int64_t channel_block(const Pooling& pooling, int64_t threads) {
  const int64_t wide = 64;
  return pooling.batch * ((pooling.channels + wide - 1) / wide) >= threads ? wide : 16;
}

int64_t backward_items(const Pooling& pooling, int64_t channel_block) {
  if (pooling.layout == Layout::contiguous && use_adaptive(pooling)) {
    return adaptive_blocks(pooling);
  }
  const int64_t blocks = (pooling.channels + channel_block - 1) / channel_block;
  return pooling.layout == Layout::contiguous ? pooling.planes() : pooling.batch * blocks;
}

template <typename T>
void pool_forward(const Pooling& pooling, const T* input, T* output, int64_t begin, int64_t end) {
  choose_kernel<T>(pooling, false).forward(pooling, input, output, begin, end);
}

template <typename T>
void pool_backward(
    const Pooling& pooling, int64_t channel_block, const T* grad_output, const T* input,
    T* grad_input, int64_t begin, int64_t end) {
  choose_kernel<T>(pooling, true)
      .backward(pooling, channel_block, grad_output, input, grad_input, begin, end);
}

#define MMSOFTPOOL_INSTANTIATE(T)                                                \
  template int64_t vector_bytes<T>(const Pooling&);                              \
  template void pool_forward<T>(const Pooling&, const T*, T*, int64_t, int64_t); \
  template void pool_backward<T>(const Pooling&, int64_t, const T*, const T*, T*, int64_t, int64_t);
MMSOFTPOOL_INSTANTIATE(float)
MMSOFTPOOL_INSTANTIATE(double)
MMSOFTPOOL_INSTANTIATE(Half)
MMSOFTPOOL_INSTANTIATE(BFloat16)
#undef MMSOFTPOOL_INSTANTIATE

}  // namespace mmsoftpool::cpu
