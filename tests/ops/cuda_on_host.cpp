// Runs the CUDA threads of csrc/cuda one after the other on the host.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../../csrc/cuda/generic.h"
#include "../../csrc/cuda/ring.h"
#include "../../csrc/cuda/with_strip.h"
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

// The slices of windows, if they are divided.
template <typename T, typename Int>
std::vector<Compute<T>> run_slices(
    const Pooling& pooling, const Indices<Int>& indices, const T* input) {
  const int64_t outputs = pooling.planes() * pooling.out_plane(), slices = count_slices(pooling);
  std::vector<Compute<T>> workspace(slices > 1 ? 3 * outputs * slices : 0);
  for (int64_t i = workspace.size() / 3; i-- > 0;) {
    summarize_slice(
        indices, make_exponent<Compute<T>>(pooling), input, workspace.data(), Int(outputs),
        Int(slices), Int(i));
  }
  return workspace;
}

template <typename T, typename Int>
void run_forward_generally(
    const Pooling& pooling, const Indices<Int>& indices, const T* input, T* output) {
  const auto exponent = make_exponent<Compute<T>>(pooling);
  const auto parts = run_slices(pooling, indices, input);
  for (Int i = static_cast<Int>(pooling.planes() * pooling.out_plane()); i-- > 0;) {
    if (parts.empty()) {
      forward_generic(indices, exponent, input, output, i);
    } else {
      forward_of_slices(exponent, parts.data(), output, count_slices(pooling), i);
    }
  }
}

template <typename T, typename Int>
void run_backward_generally(
    const Pooling& pooling, const Indices<Int>& indices, const T* grad_output, const T* input,
    T* grad_input) {
  const auto exponent = make_exponent<Compute<T>>(pooling);
  const auto parts = run_slices(pooling, indices, input);
  const Int outputs = static_cast<Int>(pooling.planes() * pooling.out_plane());
  std::vector<Compute<T>> workspace(3 * outputs);
  for (Int i = outputs; i-- > 0;) {
    if (parts.empty()) {
      summarize_window(indices, exponent, grad_output, input, workspace.data(), i);
    } else {
      summarize_slices(
          exponent, grad_output, parts.data(), workspace.data(), count_slices(pooling), i);
    }
  }
  const Compute<T>* const summaries = workspace.data();
  for (Int i = static_cast<Int>(pooling.planes() * pooling.in_plane()); i-- > 0;) {
    backward_generic(indices, exponent, summaries, input, grad_input, i);
  }
}

// Calls thread(ring, i) for all threads of a kernel.
template <typename R, typename Thread>
void run_ring(R ring, const typename R::Arguments& arguments, const Thread& thread) {
  for (int64_t i = arguments.threads; i-- > 0;) {
    const uint32_t number = static_cast<uint32_t>(i);
    with_access(ring, arguments, number, [&](auto access) { thread(access, number); });
  }
}

template <typename T>
Kind run_forward(
    const Pooling& pooling, int64_t rows, int force, bool aligned, const T* input, T* output) {
  if (force != any_kind) {
  } else if (with_strip<T, false>(pooling, aligned, [&](auto strip) {
               using S = decltype(strip);
               const auto arguments = S::forward_arguments(pooling, rows);
               for (int64_t i = arguments.threads; i-- > 0;) {
                 S::forward(arguments, input, output, static_cast<uint32_t>(i));
               }
             })) {
    return strips;
  } else if (with_ring<T>(pooling, aligned, [&](auto ring) {
               using R = decltype(ring);
               const typename R::Arguments arguments(pooling, rows);
               run_ring(ring, arguments, [&](auto access, uint32_t i) {
                 access.forward(arguments, input, output, i);
               });
             })) {
    return rings;
  }
  if (force == general_in_64_bits) {
    run_forward_generally(pooling, Indices<int64_t>(pooling), input, output);
  } else {
    run_forward_generally(pooling, Indices<int32_t>(pooling), input, output);
  }
  return general;
}

template <typename T>
Kind run_backward(
    const Pooling& pooling, int64_t rows, int force, bool aligned, const T* grad_output,
    const T* input, T* grad_input) {
  if (force != any_kind) {
  } else if (with_strip<T, true>(pooling, aligned, [&](auto strip) {
               using S = decltype(strip);
               const auto arguments = S::backward_arguments(pooling, rows);
               for (int64_t i = arguments.threads; i-- > 0;) {
                 S::backward(arguments, grad_output, input, grad_input, static_cast<uint32_t>(i));
               }
             })) {
    return strips;
  } else if (with_ring<T>(pooling, aligned, [&](auto ring) {
               using R = decltype(ring);
               const typename R::Arguments arguments(pooling, rows);
               std::vector<float> workspace(
                   4 * arguments.outputs, std::numeric_limits<float>::quiet_NaN());
               float* const numbers = workspace.data();
               if constexpr (R::kernel_size > 3) {
                 run_ring(ring, arguments, [&](auto access, uint32_t i) {
                   access.summarize(arguments, grad_output, input, numbers, i);
                 });
               }
               run_ring(ring, arguments, [&](auto access, uint32_t i) {
                 if constexpr (R::kernel_size == 3) {
                   access.backward_at_once(arguments, grad_output, input, grad_input, i);
                 } else {
                   access.backward(arguments, numbers, input, grad_input, i);
                 }
               });
             })) {
    return rings;
  }
  if (force == general_in_64_bits) {
    run_backward_generally(pooling, Indices<int64_t>(pooling), grad_output, input, grad_input);
  } else {
    run_backward_generally(pooling, Indices<int32_t>(pooling), grad_output, input, grad_input);
  }
  return general;
}

template <typename T>
int run_on(
    const Pooling& pooling, int64_t rows, int force, const void* grad_output, const void* input,
    void* output, void* grad_input) {
  const bool aligned =
      is_aligned(grad_output) && is_aligned(input) && is_aligned(output) && is_aligned(grad_input);
  const T* const x = static_cast<const T*>(input);
  const int forward = run_forward(pooling, rows, force, aligned, x, static_cast<T*>(output));
  const int backward = run_backward(
      pooling, rows, force, aligned, static_cast<const T*>(grad_output), x,
      static_cast<T*>(grad_input));
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
  return with_strip<Half, false>(pooling, true, [](auto) {}) &&
         with_strip<Half, true>(pooling, true, [](auto) {});
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
