// Vectors of a given width, and what SoftPool does with them. Written with the compilers' vector
// extension (GCC and clang): the same code serves every instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../softmax.h"

// Always inlined: code must be compiled for the instruction set of the function that it is used in.
#define MMSOFTPOOL_INLINE inline __attribute__((always_inline))
#define MMSOFTPOOL_INLINE_LAMBDA __attribute__((always_inline))

namespace mmsoftpool::cpu {

// Storage of the 16-bit types; they are computed in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ln of the smallest normal number: a weight of e^floor or less counts as 0.
template <typename A>
constexpr A exp_floor = A(-87.33654475);
template <>
inline constexpr double exp_floor<double> = -708.3964185322641;

// A, the type computed with, is float or double.
template <typename A, int Bytes>
struct Simd {
  using Scalar = A;
  static constexpr int64_t lanes = Bytes / sizeof(A);
  using Integer = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  typedef A Vec __attribute__((vector_size(Bytes)));
  typedef Integer Bits __attribute__((vector_size(Bytes)));
  typedef uint16_t Halves __attribute__((vector_size(lanes * 2)));

  static MMSOFTPOOL_INLINE Vec splat(A value) { return value - Vec{}; }

  static MMSOFTPOOL_INLINE Vec load(const A* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static MMSOFTPOOL_INLINE void store(Vec v, A* p) { std::memcpy(p, &v, sizeof(v)); }

  static MMSOFTPOOL_INLINE Bits load_halves(const void* p) {
    Halves h;
    std::memcpy(&h, p, sizeof(h));
    return __builtin_convertvector(h, Bits);
  }
  static MMSOFTPOOL_INLINE void store_halves(Bits bits, void* p) {
    const Halves h = __builtin_convertvector(bits, Halves);
    std::memcpy(p, &h, sizeof(h));
  }

  static MMSOFTPOOL_INLINE Vec load(const BFloat16* p) { return (Vec)(load_halves(p) << 16); }
  static MMSOFTPOOL_INLINE void store(Vec v, BFloat16* p) {
    const Bits b = (Bits)v;
    const Bits rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;  // to nearest, ties to even
    store_halves((Bits)(v == v ? rounded : rounded * 0u + 0x7fc0u), p);
  }

  static MMSOFTPOOL_INLINE Vec load(const Half* p) {
    const Bits h = load_halves(p);
    // Shift the exponent and mantissa into place and mend the exponent's bias by a multiplication,
    // which is right for subnormal numbers too; infinity and NaN keep all exponent bits.
    const Bits magnitude = (h & 0x7fffu) << 13;
    const Bits scaled = (Bits)((Vec)magnitude * 0x1p112f);
    const Bits special = magnitude | 0x7f800000u;
    return (Vec)((Bits)(magnitude >= 0x0f800000u ? special : scaled) | ((h & 0x8000u) << 16));
  }
  static MMSOFTPOOL_INLINE void store(Vec v, Half* p) {
    const Bits b = (Bits)v;
    const Bits magnitude = b & 0x7fffffffu;
    // To nearest, ties to even. Normal: rebias the exponent, add just under half, drop 13 bits.
    const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal: an addition that leaves the rounded mantissa in the low bits.
    const Bits subnormal = (Bits)((Vec)magnitude + 0.5f) - 0x3f000000u;
    const Bits infinite = magnitude * 0u + 0x7c00u;
    Bits h = (Bits)(magnitude < 0x38800000u ? subnormal : normal);
    h = (Bits)(magnitude >= 0x47800000u ? infinite : h);
    h = (Bits)(magnitude > 0x7f800000u ? infinite + 0x200u : h);
    store_halves(h | ((b >> 16) & 0x8000u), p);
  }

  // The first n lanes; the others are 0, or left alone in memory.
  template <typename T>
  static MMSOFTPOOL_INLINE Vec load_first(const T* p, int64_t n) {
    T buffer[lanes] = {};
    std::memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
  }
  template <typename T>
  static MMSOFTPOOL_INLINE void store_first(Vec v, T* p, int64_t n) {
    T buffer[lanes];
    store(v, buffer);
    std::memcpy(p, buffer, n * sizeof(T));
  }

  // x in [exp_floor, 0], to rounding, or NaN, which comes back as NaN. Within 1 ulp in float.
  static MMSOFTPOOL_INLINE Vec exp(Vec x) {
    if constexpr (std::is_same_v<A, double>) {
      for (int64_t i = 0; i < lanes; ++i) {
        x[i] = std::exp(x[i]);
      }
      return x;
    } else {
      // x = n ln2 + r with |r| <= ln2 / 2. Adding and subtracting 1.5 * 2^23 rounds to an integer
      // and leaves it in the low bits of the sum; a conversion would be undefined for NaN.
      const Vec shifted = x * 1.442695041f + 12582912.0f;
      const Vec n = shifted - 12582912.0f;
      Vec r = x - n * 0.693359375f;  // ln2 in two parts: the product with the first is exact
      r = r - n * -2.12194440e-4f;
      // Minimax polynomial for e^r on [-ln2/2, ln2/2] (coefficients of Cephes' expf).
      Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
      p = p * r + 8.3334519073e-3f;
      p = p * r + 4.1665795894e-2f;
      p = p * r + 1.6666665459e-1f;
      p = p * r + 5.0000001201e-1f;
      p = p * (r * r) + r + 1.0f;
      return p * (Vec)(((Bits)shifted + 127u) << 23);  // times 2^n
    }
  }
};

// The softmax of windows, one per lane, over their taps in turn. Equation 1 of the paper with the
// maximum subtracted: with d = unit * (x - max), see Exponent, the weight is w = e^(alpha d) / sum
// and the output max + mean / sum, where mean is the sum of e^(alpha d) d.
template <typename S>
struct Windows {
  using Vec = typename S::Vec;
  using A = typename S::Scalar;
  using Mask = decltype(Vec{} < Vec{});

  const Vec unit, per_unit, alpha, floor;
  const Vec max;  // times the unit
  Vec sum = Vec{};
  Vec mean = Vec{};

  // The start of the maximum: not below the lowest number, for in a window of -inf alone x - max
  // must not be -inf + inf.
  static MMSOFTPOOL_INLINE Vec lowest() { return S::splat(std::numeric_limits<A>::lowest()); }

  MMSOFTPOOL_INLINE Windows(const Exponent<A>& exponent, Vec max)
      : unit(S::splat(exponent.unit)),
        per_unit(S::splat(exponent.per_unit)),
        alpha(S::splat(exponent.alpha_per_unit)),
        floor(S::splat(exponent.floor)),
        max(max * unit) {}

  MMSOFTPOOL_INLINE Vec difference(Vec x) const { return x * unit - max; }

  // Adds a tap and returns its e^(alpha d). Comparisons with NaN are false: a NaN tap, or inf -
  // inf, stays NaN through both selects.
  MMSOFTPOOL_INLINE Vec add(Vec x) {
    const Vec difference = this->difference(x);
    const Mask absent = difference <= floor;
    const Vec d = absent ? floor : difference;
    const Vec e = S::exp(alpha * d);
    const Vec w = absent ? Vec{} : e;
    sum += w;
    mean += w * d;
    return w;
  }

  // Equation 2. No weight at all means nothing but -inf.
  MMSOFTPOOL_INLINE Vec output() const {
    const Vec y = (max + mean / sum) * per_unit;
    return sum == Vec{} ? S::splat(-std::numeric_limits<A>::infinity()) : y;
  }

  // The exact gradient of a tap is scale * w * (alpha d + offset) for w from add().
  MMSOFTPOOL_INLINE Vec scale(Vec grad_output) const {
    const Vec quotient = grad_output / sum;
    return sum == Vec{} ? Vec{} : quotient;
  }
  MMSOFTPOOL_INLINE Vec offset() const {
    const Vec average = mean / sum;
    return S::splat(1) - alpha * (sum == Vec{} ? Vec{} : average);
  }
  MMSOFTPOOL_INLINE Vec slope(Vec x, Vec offset) const {
    const Vec d = difference(x);
    return alpha * (d <= floor ? floor : d) + offset;
  }
};

}  // namespace mmsoftpool::cpu
