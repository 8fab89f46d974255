// What the translated PTX needs: bits and numbers, the instructions that are more than an
// expression, and memory that is checked.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

template <typename To, typename From>
To cast_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
template <typename Number, typename Bits>
Number as(Bits x) {
  return cast_bits<Number>(x);
}
inline uint32_t bits(float x) { return cast_bits<uint32_t>(x); }
inline uint64_t bits(double x) { return cast_bits<uint64_t>(x); }

// Approximations, as far from the right result as the PTX ISA allows, or rounded, see set_rounding.
float exp2_approx(float x);
float reciprocal_approx(float x);
double reciprocal_approx(double x);
float divide_approx(float x, float y);

float from_half_to_float(uint16_t x);
inline uint32_t from_half(uint16_t x) { return bits(from_half_to_float(x)); }
uint16_t to_half(float x);
uint16_t to_bfloat16(float x);

template <typename A>
A maximum(A x, A y) {
  return x != x ? y : y != y ? x : x == y ? (std::signbit(x) ? y : x) : x > y ? x : y;
}
template <typename A>
A minimum(A x, A y) {
  return x != x ? y : y != y ? x : x == y ? (std::signbit(x) ? x : y) : x < y ? x : y;
}
inline float max_or_nan(float x, float y) { return x != x || y != y ? NAN : maximum(x, y); }

inline uint32_t multiply_high(uint32_t x, uint32_t y) { return uint64_t(x) * y >> 32; }
inline uint32_t multiply_high(int32_t x, int32_t y) { return uint64_t(int64_t(x) * y) >> 32; }
__extension__ typedef __int128 Int128;
inline uint64_t multiply_high(uint64_t x, uint64_t y) {
  return static_cast<uint64_t>((unsigned __int128)x * y >> 64);
}
inline uint64_t multiply_high(int64_t x, int64_t y) {
  return static_cast<uint64_t>(Int128(x) * y >> 64);
}
template <typename Int>
Int shift_left(Int x, uint32_t n) {
  return n >= 8 * sizeof(Int) ? 0 : x << n;
}
template <typename Int>
Int shift_right(Int x, uint32_t n) {
  return n >= 8 * sizeof(Int) ? (x < 0 ? -1 : 0) : x >> n;
}
inline uint32_t shift_funnel_l(uint32_t low, uint32_t high, uint32_t n) {
  return static_cast<uint32_t>(((uint64_t(high) << 32 | low) << (n & 31)) >> 32);
}
inline uint32_t shift_funnel_r(uint32_t low, uint32_t high, uint32_t n) {
  return static_cast<uint32_t>((uint64_t(high) << 32 | low) >> (n & 31));
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) {
      result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    }
  }
  return result;
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> 4 * i & 15;
    uint32_t byte = both >> 8 * (selector & 7) & 0xff;
    if (selector & 8) {
      byte = byte & 0x80 ? 0xff : 0;
    }
    result |= byte << 8 * i;
  }
  return result;
}

void report(const char* what, uint64_t address, uint32_t size, int line);

// A thread of a block. Loads and stores of global memory are checked against the tensors that the
// host has declared; line is that of the PTX.
struct Thread {
  uint32_t tid, ctaid, ntid;
  const uint8_t* parameters;
  uint32_t parameters_size;

  void load(uint64_t address, uint32_t size, void* to, int line) const;
  void store(uint64_t address, uint32_t size, const void* from, int line) const;
  void parameter(uint64_t at, uint32_t size, void* to, int line) const {
    if (at % size != 0 || at + size > parameters_size) {
      return report("parameter", at, size, line);
    }
    std::memcpy(to, parameters + at, size);
  }
  template <typename Int>
  Int div(Int x, Int y, int line) const {
    return y == 0 ? (report("division by 0", 0, 0, line), Int(-1)) : x / y;
  }
  template <typename Int>
  Int rem(Int x, Int y, int line) const {
    return y == 0 ? (report("division by 0", 0, 0, line), x) : x % y;
  }
};

struct Span {
  uint32_t at, size;
};
struct Kernel {
  const char* name;
  void (*run)(Thread&);
  uint32_t parameters_size;
  std::vector<Span> parameters;
};
extern const std::vector<Kernel> kernels;
