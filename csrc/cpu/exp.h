// exp for arguments <= 0, inlined so that the compiler vectorises the loop around it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// Always inlined: a loop body must be compiled for the instruction set of the loop around it.
#define MMSOFTPOOL_INLINE inline __attribute__((always_inline))
#define MMSOFTPOOL_INLINE_LAMBDA __attribute__((always_inline))

namespace mmsoftpool::cpu {

// ln of the smallest normal number: a weight of e^floor or less counts as 0.
template <typename T>
constexpr T exp_floor();
template <>
constexpr float exp_floor<float>() {
  return -87.33654475f;
}
template <>
constexpr double exp_floor<double>() {
  return -708.3964185322641;
}

// x in [exp_floor, 0] or NaN, which comes back as NaN. Within 1 ulp for float.
MMSOFTPOOL_INLINE float exp_nonpositive(float x) {
  // x = n ln2 + r with |r| <= ln2 / 2. Adding and subtracting 1.5 * 2^23 rounds to an integer and
  // leaves it in the low bits of the sum; a conversion to int would be undefined for NaN.
  constexpr float rounder = 12582912.0f;
  const float shifted = x * 1.442695041f + rounder;
  const float n = shifted - rounder;
  float r = x - n * 0.693359375f;  // ln2 in two parts: the product with the first is exact
  r = r - n * -2.12194440e-4f;
  // Minimax polynomial for e^r on [-ln2/2, ln2/2] (coefficients of Cephes' expf).
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;  // 2^n
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

MMSOFTPOOL_INLINE double exp_nonpositive(double x) { return std::exp(x); }

}  // namespace mmsoftpool::cpu
