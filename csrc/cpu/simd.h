// Vectors of a given width, written with the vector extension of GCC and clang: the same code
// serves every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// Always inlined: code must be compiled for the instruction set of the function that it is used in.
#define MMSOFTPOOL_INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))

// Instructions that GCC does not choose itself. Clang refuses them outside of functions that are
// for their instruction set alone.
#if defined(__x86_64__) && !defined(__clang__)
#define MMSOFTPOOL_ASSEMBLY
#endif

namespace mmsoftpool::cpu {

// Simd::load_pairs and store_pairs take the first of two numbers from the low half of a lane.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

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
  typedef std::make_signed_t<Integer> Signed __attribute__((vector_size(Bytes)));
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

  // a * b - c in float, rounded once, where has_fused. Not left to the compiler: GCC rounds twice
  // with -O1.
#if defined(__aarch64__)
  static constexpr bool has_fused = true;
  static MMSOFTPOOL_INLINE Vec fused_multiply_subtract(Vec a, Vec b, Vec c) {
    Vec result = -c;
    asm("fmla %0.4s, %1.4s, %2.4s" : "+w"(result) : "w"(a), "w"(b));
    return result;
  }
#elif defined(MMSOFTPOOL_ASSEMBLY)
  static constexpr bool has_fused = Bytes >= 32;
  static MMSOFTPOOL_INLINE Vec fused_multiply_subtract(Vec a, Vec b, Vec c) {
    asm("vfmsub213ps %2, %1, %0" : "+v"(a) : "v"(b), "v"(c));
    return a;
  }
#else
  static constexpr bool has_fused = false;
#endif

  // Between halves and the low halves of lanes. One instruction, of which GCC makes several.
  static MMSOFTPOOL_INLINE Bits widen(Halves h) {
#ifdef MMSOFTPOOL_ASSEMBLY
    if constexpr (Bytes >= 32) {
      Bits bits;
      asm("vpmovzxwd %1, %0" : "=v"(bits) : "vm"(h));
      return bits;
    }
#endif
    return __builtin_convertvector(h, Bits);
  }
  static MMSOFTPOOL_INLINE Halves narrow(Bits bits) {
#ifdef MMSOFTPOOL_ASSEMBLY
    if constexpr (Bytes == 64) {
      Halves h;
      asm("vpmovdw %1, %0" : "=v"(h) : "v"(bits));
      return h;
    }
#endif
    return __builtin_convertvector(bits, Halves);
  }

  static MMSOFTPOOL_INLINE Vec from_halves(Halves h, const BFloat16*) {
    return (Vec)(widen(h) << 16);
  }
  static MMSOFTPOOL_INLINE Bits round_to_bfloat16(Vec v) {
    const Bits b = (Bits)v;
    const Bits rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;  // to nearest, ties to even
    return (Bits)(v == v ? rounded : rounded * 0u + 0x7fc0u);
  }
  static MMSOFTPOOL_INLINE Halves to_halves(Vec v, const BFloat16*) {
    return narrow(round_to_bfloat16(v));
  }

  // float16. AVX2 and AVX-512 machines have instructions for it, which keep subnormal numbers
  // whatever the mode of the processor.
  static MMSOFTPOOL_INLINE Vec from_halves(Halves halves, const Half*) {
#ifdef MMSOFTPOOL_ASSEMBLY
    if constexpr (Bytes >= 32) {
      Vec v;
      asm("vcvtph2ps %1, %0" : "=v"(v) : "vm"(halves));
      return v;
    }
#endif
    const Bits h = widen(halves);
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
  static MMSOFTPOOL_INLINE Halves to_halves(Vec v, const Half*) {
#ifdef MMSOFTPOOL_ASSEMBLY
    if constexpr (Bytes >= 32) {
      Halves h;
      asm("vcvtps2ph $0, %1, %0" : "=v"(h) : "v"(v));  // to nearest, ties to even
      return h;
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
    return narrow(h | ((b >> 16) & 0x8000u));
  }

  static MMSOFTPOOL_INLINE Integer bits(A value) {
    Integer bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
  }

  template <typename T>
  static MMSOFTPOOL_INLINE Vec load(const T* p) {
    Halves h;
    std::memcpy(&h, p, sizeof(h));
    return from_halves(h, p);
  }
  template <typename T>
  static MMSOFTPOOL_INLINE void store(Vec v, T* p) {
    const Halves h = to_halves(v, p);
    std::memcpy(p, &h, sizeof(h));
  }

  // Of 2 * lanes numbers in 16 bits, those at even and those at odd places.
  template <typename T>
  static MMSOFTPOOL_INLINE void load_pairs(const T* p, Vec& even, Vec& odd) {
    Bits pairs;
    std::memcpy(&pairs, p, sizeof(pairs));
    if constexpr (std::is_same_v<T, BFloat16>) {
      even = (Vec)(pairs << 16);
      odd = (Vec)(pairs & 0xffff0000u);
    } else {
      even = from_halves(narrow(pairs & 0xffffu), p);
      odd = from_halves(narrow(pairs >> 16), p);
    }
  }
  template <typename T>
  static MMSOFTPOOL_INLINE void store_pairs(Vec even, Vec odd, T* p) {
    Bits pairs;
    if constexpr (std::is_same_v<T, BFloat16>) {
      pairs = round_to_bfloat16(even) | round_to_bfloat16(odd) << 16;
    } else {
      pairs = widen(to_halves(even, p)) | widen(to_halves(odd, p)) << 16;
    }
    std::memcpy(p, &pairs, sizeof(pairs));
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

  // The first n lanes; n is All where all are known to be.
  using All = std::integral_constant<int64_t, lanes>;
  template <typename T, typename N>
  static MMSOFTPOOL_INLINE Vec load(const T* p, N n) {
    return std::is_same_v<N, All> || n == lanes ? load(p) : load_first(p, n);
  }
  template <typename T, typename N>
  static MMSOFTPOOL_INLINE void store(Vec v, T* p, N n) {
    if (std::is_same_v<N, All> || n == lanes) {
      store(v, p);
    } else {
      store_first(v, p, n);
    }
  }

  // Masks that are kept: a lane is in the mask if its sign bit is set. They are made without
  // comparisons, which GCC does lane by lane for vectors of 64 bytes unless a selection follows.

  // Not v >= least, which is positive.
  static MMSOFTPOOL_INLINE Bits is_below(Vec v, A least) {
    return ((Bits)v - bits(least)) | (bits(std::numeric_limits<A>::infinity()) - (Bits)v);
  }
  // Not |v| <= most.
  static MMSOFTPOOL_INLINE Bits is_beyond(Vec v, A most) {
    constexpr Integer sign = Integer(1) << (8 * sizeof(A) - 1);
    return bits(most) - ((Bits)v & ~sign);
  }
  // |v| < least, which is positive.
  static MMSOFTPOOL_INLINE Bits is_within(Vec v, A least) {
    constexpr Integer sign = Integer(1) << (8 * sizeof(A) - 1);
    return ((Bits)v & ~sign) - bits(least);
  }
  static MMSOFTPOOL_INLINE Bits first_lanes(int64_t n) {
    Bits numbers{}, end;
    Integer buffer[lanes];
    for (int64_t i = 0; i < lanes; ++i) {
      numbers[i] = Integer(i);
      buffer[i] = Integer(std::min(n, lanes));
    }
    std::memcpy(&end, buffer, sizeof(end));
    return numbers - end;
  }
  // v in the lanes of the mask, 0 in the others.
  static MMSOFTPOOL_INLINE Vec masked(Vec v, Bits mask) {
    return (Vec)((Bits)v & (Bits)((Signed)mask >> (8 * sizeof(A) - 1)));
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

  // 2^x for x between the base 2 logarithm of the smallest normal number and 0; NaN stays NaN. In
  // float it is 1 at 0 and within 1.4 units of 2^-24, and 0 for -127. With a Scale, in float alone,
  // it is 2^(x + Scale), and 0 for -127 - Scale.
  template <int Scale = 0>
  static MMSOFTPOOL_INLINE Vec exp2(Vec x) {
    if constexpr (std::is_same_v<A, double>) {
      for (int64_t i = 0; i < lanes; ++i) {
        x[i] = std::exp2(x[i]);
      }
      return x;
    } else {
      // x = n + f with |f| <= 1/2. Adding and subtracting 1.5 * 2^23 + 127 rounds to an integer and
      // leaves n + 127, the exponent of a float, in the low bits of the sum; a conversion would be
      // undefined for NaN.
      constexpr float magic = 12583039.0f + Scale;
      const Vec shifted = x + magic;
      const Vec f = x - (shifted - magic);
      return exp2_fraction(f) * (Vec)((Bits)shifted << 23);  // times 2^n
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

// Vectors with a faster exponential, for windows that take little else. It is within
// 2.7 units of 2^-24 for float, and 3e-6 for float16 and 1e-4 for bfloat16, whose roundings are 170
// and 20 times as much.
template <typename T, int Bytes>
struct FastSimd : Simd<Compute<T>, Bytes> {
  using Vec = typename Simd<Compute<T>, Bytes>::Vec;

  static MMSOFTPOOL_INLINE Vec exp2(Vec x) {
    if constexpr (std::is_same_v<T, double>) {
      return Simd<double, Bytes>::exp2(x);
    } else {
      using Bits = typename Simd<float, Bytes>::Bits;
      constexpr float magic = 12583039.0f;  // as in Simd::exp2
      const Vec shifted = x + magic, f = x - (shifted - magic);
      // 2^f = 1 + f q(f) for |f| <= 1/2, the q of degree 4, 3 or 2 with the smallest relative
      // error.
      Vec p;
      if constexpr (std::is_same_v<T, float>) {
        p = f * 1.3264727e-3f + 9.6715130e-3f;
        p = p * f + 5.5507336e-2f;
        p = p * f + 2.4022242e-1f;
        p = p * f + 6.9314700e-1f;
      } else if constexpr (std::is_same_v<T, Half>) {
        p = f * 9.5828529e-3f + 5.5906426e-2f;
        p = p * f + 2.4024099e-1f;
        p = p * f + 6.9312418e-1f;
      } else {
        p = f * 5.5008933e-2f + 2.4221097e-1f;
        p = p * f + 6.9328290e-1f;
      }
      return (p * f + 1.0f) * (Vec)((Bits)shifted << 23);
    }
  }
};

// Whether a mask of float has no lane.
template <typename Bits>
MMSOFTPOOL_INLINE bool none_of(Bits mask) {
  uint64_t words[sizeof(mask) / 8];
  std::memcpy(words, &mask, sizeof(mask));
  uint64_t any = 0;
  for (const uint64_t word : words) {
    any |= word;
  }
  return (any & 0x8000000080000000u) == 0;
}

}  // namespace mmsoftpool::cpu
