// The softmax of windows that overlap, with one exponential for every input instead of one for
// every tap of every window. In float alone.
//
// A weight e^(alpha x) is the power 2^(c x), c = alpha log2 e. Powers are kept relative to an
// integer exponent, the reference, which each row of inputs has of its own, near its largest power.
// Powers of two are exact: rows with different references are merged without a rounding error, and
// what a window gets does not depend on them. They only set the range: a window whose taps are too
// far below the reference, or which has a tap that is not a finite number, is computed in the
// general way.
#pragma once

#include <cmath>
#include <limits>

#include "softmax.h"

namespace mmsoftpool::cpu {

template <typename S>
class Powers {
 public:
  using Vec = typename S::Vec;
  using Bits = typename S::Bits;

  // What the powers of a row are relative to.
  struct Reference {
    Vec exponent;  // an integer
    Vec scale;     // c, or NaN for a row with numbers too large
    Vec floor;     // inputs of a power of 0
    Bits bias;     // of the exponent of a float, with the reference
  };

  MMSOFTPOOL_INLINE explicit Powers(const Pooling& pooling)
      : c_(S::broadcast(factor(pooling))), per_c_(S::broadcast(1 / factor(pooling))) {}

  // Whether the numbers of these windows fit: a tiny or a huge alpha has other limits.
  static bool fits(const Pooling& pooling) { return pooling.alpha > 1e-20 && pooling.alpha < 1e20; }

  // max: the largest input, ignoring NaN. Each lane has a reference of its own.
  MMSOFTPOOL_INLINE Reference reference(Vec max) const {
    const Vec lowest = per_c_ * -limit;
    const Vec x = lowest > max ? lowest : max;
    // The product of `lowest` may be rounded to a little beyond the limit.
    const Bits too_large = S::is_beyond(x * c_, 2 * limit);
    const Vec shifted = S::masked(x * c_, ~too_large) + magic;
    const Vec exponent = shifted - magic;
    return {
        exponent, c_ + S::masked(S::splat(std::numeric_limits<float>::quiet_NaN()), too_large),
        (exponent - 127.0f) * per_c_, 127u - (Bits)shifted};
  }

  // 2^(c x - reference), 0 if that is below 2^-126, and that times a factor: c x - reference, or x.
  template <bool Relative>
  MMSOFTPOOL_INLINE void power(const Reference& reference, Vec x, Vec& power, Vec& product) const {
    x = reference.floor > x ? reference.floor : x;  // NaN stays
    // c x = n + f. The magic number leaves n in the low bits of the sum.
    const Vec shifted = x * reference.scale + magic;
    const Vec n = shifted - magic;
    const Vec f = fraction(x, reference.scale, n);
    power = S::exp2_fraction(f) * (Vec)(((Bits)shifted + reference.bias) << 23);
    product = power * (Relative ? (n - reference.exponent) + f : x);
  }

  // 2^difference of two references, where that is not positive.
  static MMSOFTPOOL_INLINE Vec ratio(Vec difference) {
    const Vec lowest = S::splat(-127);
    const Vec n = lowest > difference ? lowest : difference;
    return (Vec)(((Bits)(n + magic) + 127u) << 23);
  }

 private:
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23
  static constexpr float limit = 0x1p20f;      // of exponents

  static float factor(const Pooling& pooling) {
    return static_cast<float>(pooling.alpha * 1.4426950408889634);
  }

  // c x - n without the rounding error of c x.
  static MMSOFTPOOL_INLINE Vec fraction(Vec x, Vec c, Vec n) {
    if constexpr (S::has_fused) {
      return S::fused_multiply_subtract(x, c, n);
    } else {
      // Exact products of halves of the digits.
      const Vec x_high = (Vec)((Bits)x & 0xfffff000u), c_high = (Vec)((Bits)c & 0xfffff000u);
      const Vec x_low = x - x_high, c_low = c - c_high;
      return ((x_high * c_high - n) + x_high * c_low) + x_low * c;
    }
  }

  Vec c_, per_c_;
};

constexpr float ln2 = 0.69314718f;

// What the backward spreads over a window's taps. With the power p_i = 2^(v_i), the gradient of tap
// i is g p_i / S (1 + alpha (x_i - y)) = p_i (a + ln 2 v_i b): the sums of a and of b over the
// windows of an input are separable. In a row whose reference is lower by d the v_i are larger by
// d.
template <typename S>
struct Shares {
  using Vec = typename S::Vec;
  Vec a, b;
  // sum: of the p_i. product: of the p_i v_i.
  MMSOFTPOOL_INLINE Shares(Vec sum, Vec product, Vec grad_output, Gradient gradient)
      : a(grad_output / sum), b(a) {
    if (gradient == Gradient::exact) {
      a = b * (1.0f - ln2 * (product / sum));
    }
  }
  MMSOFTPOOL_INLINE typename S::Bits are_wrong(Vec sum) const {
    return S::is_below(sum, smallest_sum) | S::is_beyond(b, 0x1p100f);
  }

  // The gradient of an input with the sums of a and of b over its windows. Where the power is NaN
  // all of its windows are computed in the general way.
  static MMSOFTPOOL_INLINE Vec gradient(
      const float* power, const float* product, const float* a, const float* b, Gradient gradient) {
    const Vec p = S::load(power);
    Vec v = p * S::load(a);
    if (gradient == Gradient::exact) {
      v += ln2 * S::load(product) * S::load(b);
    }
    return p == p ? v : Vec{};
  }
};

}  // namespace mmsoftpool::cpu
