// Runs the CUDA threads of csrc/cuda one after the other on the host.
#include <cmath>
#include <cstring>
#include <vector>

#include "../../csrc/cuda/generic.h"
#include "../../csrc/cuda/strip.h"

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

// shape: layout (1 for channels last), batch, channels, and in, out, kernel_size, stride, padding,
// dilation of depth, height and width.
Pooling make_pooling(const int64_t* shape, double alpha, int exact) {
  Pooling pooling;
  pooling.layout = shape[0] ? Layout::channels_last : Layout::contiguous;
  pooling.batch = shape[1];
  pooling.channels = shape[2];
  Axis* const axes[] = {&pooling.depth, &pooling.height, &pooling.width};
  for (int i = 0; i < 3; ++i) {
    const int64_t* const a = shape + 3 + 6 * i;
    *axes[i] = Axis{a[0], a[1], a[2], a[3], a[4], a[5]};
  }
  pooling.alpha = alpha;
  pooling.gradient = exact ? Gradient::exact : Gradient::paper;
  return pooling;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Returns whether the pooling has strips, which are then what ran: 1 bit for the forward, 1 for the
// backward.
template <typename T>
int run(
    const Pooling& pooling, int64_t rows, bool force_generic, const T* grad_output, const T* input,
    T* output, T* grad_input) {
  const bool aligned =
      is_aligned(grad_output) && is_aligned(input) && is_aligned(output) && is_aligned(grad_input);
  const auto exponent = make_exponent<float>(pooling);
  const int64_t outputs = pooling.planes() * pooling.out_plane();
  const bool forward_strip =
      !force_generic && with_strip<T, false>(pooling, aligned, [&](auto strip) {
        using S = decltype(strip);
        const auto arguments = S::forward_arguments(pooling, rows);
        for (int64_t i = arguments.threads; i-- > 0;) {
          S::forward(arguments, input, output, static_cast<uint32_t>(i));
        }
      });
  if (!forward_strip) {
    for (int64_t i = outputs; i-- > 0;) {
      forward_generic(pooling, exponent, input, output, i);
    }
  }
  const bool backward_strip =
      !force_generic && with_strip<T, true>(pooling, aligned, [&](auto strip) {
        using S = decltype(strip);
        const auto arguments = S::backward_arguments(pooling, rows);
        for (int64_t i = arguments.threads; i-- > 0;) {
          S::backward(arguments, grad_output, input, grad_input, static_cast<uint32_t>(i));
        }
      });
  if (!backward_strip) {
    std::vector<float> workspace(3 * outputs);
    for (int64_t i = outputs; i-- > 0;) {
      summarize_window(pooling, exponent, grad_output, input, workspace.data(), i);
    }
    for (int64_t i = pooling.planes() * pooling.in_plane(); i-- > 0;) {
      backward_generic(pooling, exponent, workspace.data(), input, grad_input, i);
    }
  }
  return forward_strip + 2 * backward_strip;
}

template <typename T>
int run_on(
    const Pooling& pooling, int64_t rows, bool force_generic, const void* grad_output,
    const void* input, void* output, void* grad_input) {
  return run(
      pooling, rows, force_generic, static_cast<const T*>(grad_output),
      static_cast<const T*>(input), static_cast<T*>(output), static_cast<T*>(grad_input));
}

}  // namespace

// Whether a pooling of aligned float16 tensors has a strip.
extern "C" int has_strip(const int64_t* shape) {
  const Pooling pooling = make_pooling(shape, 1, 1);
  return with_strip<Half, false>(pooling, true, [](auto) {}) &&
         with_strip<Half, true>(pooling, true, [](auto) {});
}

// dtype: 0 for float, 1 for float16, 2 for bfloat16.
extern "C" int run_threads(
    int dtype, const int64_t* shape, double alpha, int exact, int64_t rows, int force_generic,
    const void* grad_output, const void* input, void* output, void* grad_input) {
  const Pooling pooling = make_pooling(shape, alpha, exact);
  const auto run_as = dtype == 0 ? run_on<float> : dtype == 1 ? run_on<Half> : run_on<BFloat16>;
  return run_as(pooling, rows, force_generic, grad_output, input, output, grad_input);
}

// The emulated types, for a test of their own.
extern "C" void convert(int dtype, const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = dtype == 1 ? float(Half(from[i])) : float(BFloat16(from[i]));
  }
}
