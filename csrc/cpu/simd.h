// Vectors of a given width, written with the vector extension of GCC and clang: the same code
// serves every instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

// A, the type computed with, is float or double.
template <typename A, int Bytes>
struct Simd {
  using Scalar = A;
  static constexpr int64_t lanes = Bytes / sizeof(A);
  using Integer = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  typedef A Vec __attribute__((vector_size(Bytes)));
  typedef Integer Bits __attribute__((vector_size(Bytes)));
  typedef uint16_t Halves __attribute__((vector_size(lanes * 2)));

  // splat is for constants: of a variable GCC would set one lane after the other.
  static MMSOFTPOOL_INLINE Vec splat(A value) { return value - Vec{}; }
  static MMSOFTPOOL_INLINE Vec broadcast(A value) {
    A buffer[lanes];
    for (int64_t i = 0; i < lanes; ++i) {
      buffer[i] = value;
    }
    return load(buffer);
  }

  static MMSOFTPOOL_INLINE Vec lane_numbers() {
    Vec v{};
    for (int64_t i = 0; i < lanes; ++i) {
      v[i] = A(i);
    }
    return v;
  }

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

  // float16. AVX2 and AVX-512 machines have instructions for it, which keep subnormal numbers
  // whatever the mode of the processor.
  static MMSOFTPOOL_INLINE Vec load(const Half* p) {
#if defined(__x86_64__)
    if constexpr (Bytes >= 32) {
      Halves h;
      std::memcpy(&h, p, sizeof(h));
      Vec v;
      asm("vcvtph2ps %1, %0" : "=v"(v) : "v"(h));
      return v;
    }
#endif
    const Bits h = load_halves(p);
    const Bits magnitude = (h & 0x7fffu) << 13;
    // Normal: shift the exponent and mantissa into place and correct the exponent's bias; infinity
    // and NaN keep all exponent bits.
    const Bits normal = magnitude + 0x38000000u;
    const Bits special = magnitude | 0x7f800000u;
    // Subnormal: with one more in the exponent it is 2^-14 too much.
    const Bits subnormal = (Bits)((Vec)(normal + 0x00800000u) - 0x1p-14f);
    Bits bits = (Bits)(magnitude >= 0x0f800000u ? special : normal);
    bits = (Bits)(magnitude < 0x00800000u ? subnormal : bits);
    return (Vec)(bits | ((h & 0x8000u) << 16));
  }
  static MMSOFTPOOL_INLINE void store(Vec v, Half* p) {
#if defined(__x86_64__)
    if constexpr (Bytes >= 32) {
      Halves h;
      asm("vcvtps2ph $0, %1, %0" : "=v"(h) : "v"(v));  // to nearest, ties to even
      std::memcpy(p, &h, sizeof(h));
      return;
    }
#endif
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

  // Combines all lanes in a fixed order: halves, then their halves, and so on.
  template <typename Combine>
  static MMSOFTPOOL_INLINE A reduce(Vec v, Combine&& combine) {
    if constexpr (lanes == 2) {
      return combine(v[0], v[1]);
    } else {
      using Narrow = Simd<A, Bytes / 2>;
      typename Narrow::Vec low, high;
      std::memcpy(&low, &v, sizeof(low));
      std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
      return Narrow::reduce(combine(low, high), combine);
    }
  }

  // 2^x for x between the base 2 logarithm of the smallest normal number and 0; NaN stays NaN.
  // 1 at 0, and within 1.4 units of 2^-24 in float.
  static MMSOFTPOOL_INLINE Vec exp2(Vec x) {
    if constexpr (std::is_same_v<A, double>) {
      for (int64_t i = 0; i < lanes; ++i) {
        x[i] = std::exp2(x[i]);
      }
      return x;
    } else {
      // x = n + f with |f| <= 1/2. Adding and subtracting 1.5 * 2^23 rounds to an integer and
      // leaves it in the low bits of the sum; a conversion would be undefined for NaN.
      const Vec shifted = x + 12582912.0f;
      const Vec f = x - (shifted - 12582912.0f);
      return exp2_fraction(f) * (Vec)(((Bits)shifted + 127u) << 23);  // times 2^n
    }
  }

  // 2^f for |f| <= 1/2 in float: 1 + f q(f), the q of degree 5 with the smallest relative error,
  // 2e-9.
  static MMSOFTPOOL_INLINE Vec exp2_fraction(Vec f) {
    Vec p = f * 1.5353362e-4f + 1.3398875e-3f;
    p = p * f + 9.6184374e-3f;
    p = p * f + 5.5503325e-2f;
    p = p * f + 2.4022648e-1f;
    p = p * f + 6.9314720e-1f;
    return p * f + 1.0f;
  }
};

}  // namespace mmsoftpool::cpu
