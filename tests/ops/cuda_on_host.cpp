// Runs the CUDA threads of csrc/cuda one after the other on the host.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "../../csrc/cuda/select.h"
#include "pooling_argument.h"

using namespace mmsoftpool;
using namespace mmsoftpool::cuda;

namespace {

// The 16-bit types of the GPU: only conversions, which round to even.
struct Half {
  uint16_t bits;

  Half() = default;
  explicit Half(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float a = std::fabs(x);
    if (std::isnan(x)) {
      bits = 0x7e00;
    } else if (a >= 65520) {
      bits = sign | 0x7c00;
    } else if (a < 0x1p-14f) {
      bits = sign | static_cast<uint16_t>(std::nearbyint(a * 0x1p24f));
    } else {
      int exponent;
      const float fraction = std::frexp(a, &exponent);  // in [0.5, 1)
      const int mantissa = static_cast<int>(std::nearbyint(fraction * 0x1p11f)) - 1024;
      bits = sign | static_cast<uint16_t>(((exponent + 14) << 10) + mantissa);
    }
  }
  explicit operator float() const {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float a = exponent == 31  ? (mantissa ? NAN : INFINITY)
                    : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                    : std::ldexp(float(1024 + mantissa), exponent - 25);
    return bits & 0x8000 ? -a : a;
  }
};

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float x) {
    uint32_t word;
    std::memcpy(&word, &x, sizeof(word));
    bits = std::isnan(x) ? 0x7fc0 : static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &word, sizeof(x));
    return x;
  }
};

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

enum Kind { general, strips, rings };
enum Force { any_kind, general_in_32_bits, general_in_64_bits };

template <typename K>
constexpr Kind kind_of = K::has_slices                                           ? general
                         : std::is_same_v<typename K::Arguments, StripArguments> ? strips
                                                                                 : rings;

// Calls run(kernel) with that of the pooling, or with the general one if it is forced.
template <typename T, bool Backward, typename Run>
Kind with_forced_kernel(const Pooling& pooling, int force, bool aligned, const Run& run) {
  Kind kind = general;
  if (force == general_in_32_bits) {
    run(General<T, int32_t>());
  } else if (force == general_in_64_bits) {
    run(General<T, int64_t>());
  } else {
    with_kernel<T, Backward>(pooling, aligned, [&](auto kernel) {
      run(kernel);
      kind = kind_of<decltype(kernel)>;
    });
  }
  return kind;
}

// Calls thread(kernel, i) for all threads, the last one first.
template <typename K, typename Thread>
void run_threads_of(const typename K::Arguments& arguments, const Thread& thread) {
  for (int64_t i = arguments.threads; i-- > 0;) {
    const auto number = static_cast<typename K::Int>(i);
    with_way(K(), arguments, number, [&](auto kernel) { thread(kernel, number); });
  }
}

// Aligned for the largest packs, as every tensor that torch makes on a GPU; malloc's 16 bytes are
// not enough.
template <typename A>
using Workspace = std::unique_ptr<A[], decltype(&std::free)>;

template <typename A>
Workspace<A> make_workspace(int64_t numbers) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 512, numbers * sizeof(A)) != 0) {
    throw std::bad_alloc();
  }
  std::fill_n(static_cast<A*>(memory), numbers, std::numeric_limits<A>::quiet_NaN());
  return {static_cast<A*>(memory), &std::free};
}

// The slices of windows, if K has such and they are divided.
template <typename K, typename T>
Workspace<Compute<T>> run_slices(typename K::Arguments& arguments, const T* input) {
  Workspace<Compute<T>> slices(nullptr, &std::free);
  if constexpr (K::has_slices) {
    if (arguments.slices > 1) {
      auto of_slices = arguments;
      of_slices.threads = int64_t(arguments.outputs) * arguments.slices;
      slices = make_workspace<Compute<T>>(3 * of_slices.threads);
      arguments.slices_of_windows = of_slices.slices_of_windows = slices.get();
      run_threads_of<K>(
          of_slices, [&](auto kernel, auto i) { kernel.summarize_slice(of_slices, input, i); });
    }
  }
  return slices;
}

template <typename T>
int run_on(
    const Pooling& pooling, int64_t rows, int force, const void* grad_output, const void* input,
    void* output, void* grad_input) {
  const bool aligned =
      is_aligned(grad_output) && is_aligned(input) && is_aligned(output) && is_aligned(grad_input);
  const T* const x = static_cast<const T*>(input);
  const T* const grad_y = static_cast<const T*>(grad_output);
  T* const y = static_cast<T*>(output);
  T* const grad_x = static_cast<T*>(grad_input);
  const auto run_forward = [&](auto kernel) {
    using K = decltype(kernel);
    auto arguments = K::forward_arguments(pooling, rows);
    const auto slices = run_slices<K>(arguments, x);
    run_threads_of<K>(arguments, [&](auto way, auto i) { way.forward(arguments, x, y, i); });
  };
  const auto run_backward = [&](auto kernel) {
    using K = decltype(kernel);
    const auto second = K::backward_arguments(pooling, rows);
    if constexpr (K::two_steps) {
      auto first = K::forward_arguments(pooling, rows);
      const auto slices = run_slices<K>(first, x);
      const auto workspace = make_workspace<Compute<T>>(K::workspace(pooling));
      Compute<T>* const numbers = workspace.get();
      run_threads_of<K>(
          first, [&](auto way, auto i) { way.summarize(first, grad_y, x, numbers, i); });
      run_threads_of<K>(
          second, [&](auto way, auto i) { way.backward(second, numbers, x, grad_x, i); });
    } else {
      run_threads_of<K>(
          second, [&](auto way, auto i) { way.backward(second, grad_y, x, grad_x, i); });
    }
  };
  const Kind forward = with_forced_kernel<T, false>(pooling, force, aligned, run_forward);
  const Kind backward = with_forced_kernel<T, true>(pooling, force, aligned, run_backward);
  return forward == backward ? forward : -1;
}

}  // namespace

// Into how many slices a window is divided.
extern "C" int count_slices_of(const int64_t* shape) {
  return static_cast<int>(count_slices(make_pooling(shape, 1, 1)));
}

// Whether a pooling of aligned float16 tensors has a strip.
extern "C" int has_strip(const int64_t* shape) {
  const Pooling pooling = make_pooling(shape, 1, 1);
  const auto ignore = [](auto) {};
  return with_forced_kernel<Half, false>(pooling, any_kind, true, ignore) == strips &&
         with_forced_kernel<Half, true>(pooling, any_kind, true, ignore) == strips;
}

// dtype: 0 for float, 1 for float16, 2 for bfloat16, 3 for double. Returns which kernels ran, a
// Kind, or -1 for different ones in the forward and the backward.
extern "C" int run_threads(
    int dtype, const int64_t* shape, double alpha, int exact, int64_t rows, int force,
    const void* grad_output, const void* input, void* output, void* grad_input) {
  const Pooling pooling = make_pooling(shape, alpha, exact);
  const auto run_as = dtype == 0   ? run_on<float>
                      : dtype == 1 ? run_on<Half>
                      : dtype == 2 ? run_on<BFloat16>
                                   : run_on<double>;
  return run_as(pooling, rows, force, grad_output, input, output, grad_input);
}

extern "C" int fits_32(const int64_t* shape) { return fits_32_bits(make_pooling(shape, 1, 1)); }

// The emulated types, for a test of their own.
extern "C" void convert(int dtype, const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = dtype == 1 ? float(Half(from[i])) : float(BFloat16(from[i]));
  }
}
