// The softmax of one window, in one CUDA thread.
//
// What a thread does is written as plain functions of the arguments of the call and the number of
// the thread: here, in generic.h, strip.h and ring.h. So the host can run all threads one after the
// other, and the tests do (tests/ops/test_cuda_on_host.py): the index arithmetic is checked without
// a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../exponent.h"
#include "../pooling.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MMSOFTPOOL_BODY __host__ __device__ __forceinline__
#else
#define MMSOFTPOOL_BODY inline
#endif
#ifdef __CUDA_ARCH__
#define MMSOFTPOOL_UNROLL _Pragma("unroll")
#define MMSOFTPOOL_NO_UNROLL _Pragma("unroll 1")
#define MMSOFTPOOL_UNROLL_TWICE _Pragma("unroll 2")
#else
#define MMSOFTPOOL_UNROLL
#define MMSOFTPOOL_NO_UNROLL
#define MMSOFTPOOL_UNROLL_TWICE
#endif

namespace mmsoftpool::cuda {

template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

// 2^x for x <= 0, 0 where a float would be denormal; NaN stays NaN.
MMSOFTPOOL_BODY float exp2_or_zero(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // 2 ulp
  return y;
#else
  const float y = ::exp2f(x);
  return y < std::numeric_limits<float>::min() ? 0 : y;
#endif
}
MMSOFTPOOL_BODY double exp2_or_zero(double x) { return ::exp2(x); }

// The larger number; NaN if x is NaN. (fmaxf gives the other number then.)
MMSOFTPOOL_BODY float max_or_nan(float x, float y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return x < y ? y : x;
#endif
}

// 1 / x for an x that is neither tiny nor huge.
MMSOFTPOOL_BODY float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // 1 ulp
  return y;
#else
  return 1 / x;
#endif
}

// Whether two numbers are at most 8 units in the last place apart.
MMSOFTPOOL_BODY bool are_close(float x, float y) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x) - __float_as_uint(y) + 8 <= 16;
#else
  uint32_t bits[2];
  std::memcpy(bits, &x, sizeof(x));
  std::memcpy(bits + 1, &y, sizeof(y));
  return bits[0] - bits[1] + 8 <= 16;
#endif
}

template <typename A>
Exponent<A> make_exponent(const Pooling& pooling) {
  return Exponent<A>(
      pooling.alpha, pooling.taps(), A(sizeof(A) == 4 ? -104 : -746));  // e^x is 0 there
}

// a / sum for a sum of weights, between 1 and the number of taps, or NaN.
MMSOFTPOOL_BODY float divide_by_sum(float a, float sum) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, sum);  // 2 ulp, and no subroutine call
#else
  return a / sum;
#endif
}
MMSOFTPOOL_BODY double divide_by_sum(double a, double sum) { return a / sum; }

// The softmax of a window over its taps in turn: eq. 1 with the maximum subtracted. With
// d = unit * (x - max), see Exponent, a weight is e^(alpha d) / sum, and the output, eq. 2, is
// max + mean / sum, where mean is the sum of e^(alpha d) d.
template <typename A>
struct Window {
  const Exponent<A>& exponent;
  A max;  // times the unit
  // Of many taps, the more the closer alpha is to 0: with what rounding has left out (Kahan).
  A sum = 0, rest_of_sum = 0;
  A mean = 0, rest_of_mean = 0;

  // The start of the maximum: not below the lowest number, for in a window of -inf alone x - max
  // must not be -inf + inf.
  static constexpr A lowest = std::numeric_limits<A>::lowest();

  // First over all taps. Passes over NaN, which shows up in weight().
  static MMSOFTPOOL_BODY A update_max(A max, A x) { return x > max ? x : max; }

  MMSOFTPOOL_BODY Window(const Exponent<A>& exponent, A scaled_max)
      : exponent(exponent), max(scaled_max) {}

  // d, not below the floor. A comparison with NaN is false: NaN stays NaN.
  MMSOFTPOOL_BODY A difference(A x) const {
    const A d = x * exponent.unit - max;
    return d < exponent.floor ? exponent.floor : d;
  }
  // e^(alpha d).
  MMSOFTPOOL_BODY A weight(A d) const {
    return d <= exponent.floor ? A(0) : exp2_or_zero(d * exponent.log2e_alpha_per_unit);
  }

  MMSOFTPOOL_BODY void add(A x) {
    const A d = difference(x);
    const A w = weight(d);
    add_exactly(w, sum, rest_of_sum);
    add_exactly(w * d, mean, rest_of_mean);
  }
  // Adds a part of the window, of which other_max is the maximum, not above that of the window.
  MMSOFTPOOL_BODY void add_window(A other_max, A other_sum, A other_mean) {
    A d = other_max - max;
    d = d < exponent.floor ? exponent.floor : d;
    const A w = weight(d);
    add_exactly(w * other_sum, sum, rest_of_sum);
    add_exactly(w * (other_mean + other_sum * d), mean, rest_of_mean);
  }
  static MMSOFTPOOL_BODY void add_exactly(A number, A& sum, A& rest) {
    number -= rest;
    const A before = sum;
    sum += number;
    rest = (sum - before) - number;
  }

  // Eq. 2. No weight at all means nothing but -inf. The mean may be nearly -max: what the division
  // and the sums leave out counts.
  MMSOFTPOOL_BODY A output() const {
    if (sum == 0) {
      return -std::numeric_limits<A>::infinity();
    }
    const A quotient = divide_by_sum(mean, sum);
    const A rest = std::fma(-quotient, sum, mean) + (quotient * rest_of_sum - rest_of_mean);
    return ((max + quotient) + divide_by_sum(rest, sum)) * exponent.per_unit;
  }

  // The gradient of a tap is scale * share(x, offset, gradient).
  MMSOFTPOOL_BODY A scale(A grad_output) const {
    return sum == 0 ? A(0) : divide_by_sum(grad_output, sum);
  }
  MMSOFTPOOL_BODY A offset() const {
    return sum == 0 ? A(1) : 1 - exponent.alpha_per_unit * divide_by_sum(mean, sum);
  }
  MMSOFTPOOL_BODY A share(A x, A offset, Gradient gradient) const {
    const A d = difference(x);
    return weight(d) * (gradient == Gradient::exact ? exponent.alpha_per_unit * d + offset : A(1));
  }
};

}  // namespace mmsoftpool::cuda
