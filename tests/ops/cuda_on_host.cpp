// Runs the CUDA threads of csrc/cuda one after the other on the host.
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../../csrc/cuda/generic.h"
#include "../../csrc/cuda/tile.h"
#include "../../csrc/cuda/with_strip.h"

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
// dilation of depth, height and width; kernel_size 0 for an adaptive axis.
Pooling make_pooling(const int64_t* shape, double alpha, int exact) {
  Pooling pooling;
  pooling.layout = shape[0] ? Layout::channels_last : Layout::contiguous;
  pooling.batch = shape[1];
  pooling.channels = shape[2];
  Axis* const axes[] = {&pooling.depth, &pooling.height, &pooling.width};
  for (int i = 0; i < 3; ++i) {
    const int64_t* const a = shape + 3 + 6 * i;
    *axes[i] = a[2] > 0 ? Axis{a[0], a[1], a[2], a[3], a[4], a[5]} : adaptive_axis(a[0], a[1]);
  }
  pooling.alpha = alpha;
  pooling.gradient = exact ? Gradient::exact : Gradient::paper;
  return pooling;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// A block of threads, each phase for one after the other: in either order, since no thread may
// depend on what another one does in the same phase.
struct HostBlock {
  int32_t threads;
  bool descending;

  template <typename Run>
  void each(const Run& run) const {
    for (int32_t i = 0; i < threads; ++i) {
      run(descending ? threads - 1 - i : i);
    }
  }
  template <typename Is>
  bool any(const Is& is) const {
    bool result = false;
    each([&](int32_t i) { result |= is(i); });
    return result;
  }
  template <typename A>
  struct Largest {
    std::array<A, 8> values;
    int32_t lanes;
    A operator[](int32_t i) const { return values[i % lanes]; }
  };
  template <typename A, typename Value>
  Largest<A> max(int log2_lanes, const Value& value_of) const {
    Largest<A> largest;
    largest.lanes = 1 << log2_lanes;
    largest.values.fill(-std::numeric_limits<A>::infinity());
    each([&](int32_t i) {
      A& value = largest.values[i % largest.lanes];
      value = std::fmax(value, value_of(i));
    });
    return largest;
  }
};

// Calls run(block, arguments, shared memory, plane, h, w) for all tiles of a pooling that has
// tiles.
template <typename T, bool Backward, typename Run>
bool run_tiles(const Pooling& pooling, bool descending, const Run& run) {
  return with_tile<T, Backward>(pooling, [&](const auto& arguments) {
    using Numbers = Pair<Compute<T>>;
    constexpr auto nan = std::numeric_limits<Compute<T>>::quiet_NaN();
    const HostBlock block{arguments.threads, descending};
    for (int64_t plane = 0; plane < arguments.planes; ++plane) {
      for (int32_t h = 0; h < arguments.height.tiles; ++h) {
        for (int32_t w = 0; w < arguments.width.tiles; ++w) {
          std::vector<Numbers> shared(arguments.shared() / sizeof(Numbers), Numbers{nan, nan});
          run(block, arguments, shared.data(), static_cast<int32_t>(plane), h, w);
        }
      }
    }
  });
}

enum Kind { general, strips, tiles };
enum Force { any_kind, general_in_32_bits, general_in_64_bits, descending };

bool is_general(int force) { return force == general_in_32_bits || force == general_in_64_bits; }

template <typename T, typename Int>
void run_forward_generally(
    const Pooling& pooling, const Indices<Int>& indices, const T* input, T* output) {
  const auto exponent = make_exponent<Compute<T>>(pooling);
  for (Int i = static_cast<Int>(pooling.planes() * pooling.out_plane()); i-- > 0;) {
    forward_generic(indices, exponent, input, output, i);
  }
}

template <typename T, typename Int>
void run_backward_generally(
    const Pooling& pooling, const Indices<Int>& indices, const T* grad_output, const T* input,
    T* grad_input) {
  const auto exponent = make_exponent<Compute<T>>(pooling);
  const Int outputs = static_cast<Int>(pooling.planes() * pooling.out_plane());
  std::vector<Compute<T>> workspace(3 * outputs);
  for (Int i = outputs; i-- > 0;) {
    summarize_window(indices, exponent, grad_output, input, workspace.data(), i);
  }
  const Compute<T>* const summaries = workspace.data();
  for (Int i = static_cast<Int>(pooling.planes() * pooling.in_plane()); i-- > 0;) {
    backward_generic(indices, exponent, summaries, input, grad_input, i);
  }
}

template <typename T>
Kind run_forward(
    const Pooling& pooling, int64_t rows, int force, bool aligned, const T* input, T* output) {
  if (is_general(force)) {
  } else if (with_strip<T, false>(pooling, aligned, [&](auto strip) {
               using S = decltype(strip);
               const auto arguments = S::forward_arguments(pooling, rows);
               for (int64_t i = arguments.threads; i-- > 0;) {
                 S::forward(arguments, input, output, static_cast<uint32_t>(i));
               }
             })) {
    return strips;
  } else if (
      run_tiles<T, false>(
          pooling, force == descending,
          [&](const HostBlock& block, const auto& arguments, auto* shared, int32_t plane, int32_t h,
              int32_t w) {
            Tile<T, false>::forward(block, arguments, input, output, shared, plane, h, w);
          })) {
    return tiles;
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
  if (is_general(force)) {
  } else if (with_strip<T, true>(pooling, aligned, [&](auto strip) {
               using S = decltype(strip);
               const auto arguments = S::backward_arguments(pooling, rows);
               for (int64_t i = arguments.threads; i-- > 0;) {
                 S::backward(arguments, grad_output, input, grad_input, static_cast<uint32_t>(i));
               }
             })) {
    return strips;
  } else if (
      run_tiles<T, true>(
          pooling, force == descending,
          [&](const HostBlock& block, const auto& arguments, auto* shared, int32_t plane, int32_t h,
              int32_t w) {
            Tile<T, true>::backward(
                block, arguments, grad_output, input, grad_input, shared, plane, h, w);
          })) {
    return tiles;
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

// Whether a pooling of aligned float16 tensors has a strip.
extern "C" int has_strip(const int64_t* shape) {
  const Pooling pooling = make_pooling(shape, 1, 1);
  return with_strip<Half, false>(pooling, true, [](auto) {}) &&
         with_strip<Half, true>(pooling, true, [](auto) {});
}

template <typename S>
void write_shares(
    const Pooling& pooling, const float* grad_output, const float* input, float* output,
    float* grad_input, double* shares) {
  const auto share = [](int64_t threads, const auto& is_right) {
    int64_t right = 0;
    for (int64_t i = 0; i < threads; ++i) {
      right += is_right(static_cast<uint32_t>(i));
    }
    return double(right) / double(threads);
  };
  const auto a = S::forward_arguments(pooling, 4), b = S::backward_arguments(pooling, 4);
  shares[0] = share(a.threads, [&](uint32_t i) { return S::forward_by_sums(a, input, output, i); });
  shares[1] = share(b.threads, [&](uint32_t i) {
    return S::backward_by_sums(b, grad_output, input, grad_input, i);
  });
}

// Writes the shares of the threads that need nothing but sums of powers, in the forward and in the
// backward, for float32, 3 x 3 windows of stride 1 and a multiple of four columns.
extern "C" void shares_by_sums(
    const int64_t* shape, double alpha, const float* grad_output, const float* input, float* output,
    float* grad_input, double* shares) {
  const Pooling pooling = make_pooling(shape, alpha, 1);
  const auto write = pooling.layout == Layout::channels_last
                         ? write_shares<SumStrip<float, 3, 1, 1, 2, 2, false>>
                         : write_shares<SumStrip<float, 3, 1, 1, 4, 1, true>>;
  write(pooling, grad_output, input, output, grad_input, shares);
}

template <typename T, bool Backward>
int write_plan(const Pooling& pooling, int64_t* plan) {
  return with_tile<T, Backward>(pooling, [&](const auto& a) {
    const int64_t numbers[] = {a.lanes,         a.threads,        a.shared(),     a.height.tiles,
                               a.width.tiles,   a.height.inputs,  a.width.inputs, a.height.windows,
                               a.width.windows, a.height.written, a.width.written};
    std::copy(std::begin(numbers), std::end(numbers), plan);
  });
}

// Writes how a pooling is divided into tiles, as TilePlan in mmsoftpool/analysis/roofline.py has
// it; returns 0 if it is not. wide: for double.
extern "C" int tile_plan(const int64_t* shape, int backward, int wide, int64_t* plan) {
  const Pooling pooling = make_pooling(shape, 1, 1);
  return wide ? (backward ? write_plan<double, true> : write_plan<double, false>)(pooling, plan)
              : (backward ? write_plan<float, true> : write_plan<float, false>)(pooling, plan);
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
