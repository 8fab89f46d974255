// Several neighbouring numbers, moved and converted at once.
#pragma once

#include "window.h"

namespace mmsoftpool::cuda {

// `Count` neighbouring numbers that one instruction moves: they are aligned to their whole size.
template <typename T, int Count>
struct alignas(sizeof(T) * Count) Pack {
  T values[Count];
};

// Keeps the compiler from knowing x. A pointer that such a number is added to takes one instruction,
// a multiplication to 64 bits; a number that it knows is made one of 64 bits, which take two.
MMSOFTPOOL_BODY int32_t opaque(int32_t x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Between the type of the tensors and float, or of the same type. The 16-bit types go in pairs: the GPU takes a number
// out of a register with two, or packs two, in one instruction.
template <typename T, int Count, typename Number>
MMSOFTPOOL_BODY void unpack(const Pack<T, Count>& pack, Number* numbers) {
  MMSOFTPOOL_UNROLL
  for (int i = 0; i < Count; ++i) {
    numbers[i] = Number(pack.values[i]);
  }
}
template <int Count, typename T, typename Number>
MMSOFTPOOL_BODY void pack_numbers(const Number* numbers, Pack<T, Count>& pack) {
  MMSOFTPOOL_UNROLL
  for (int i = 0; i < Count; ++i) {
    pack.values[i] = T(numbers[i]);
  }
}
#ifdef __CUDACC__
MMSOFTPOOL_BODY float2 to_float2(__half2 pair) { return __half22float2(pair); }
MMSOFTPOOL_BODY float2 to_float2(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
MMSOFTPOOL_BODY void from_float2(float a, float b, __half2& pair) {
  pair = __floats2half2_rn(a, b);
}
MMSOFTPOOL_BODY void from_float2(float a, float b, __nv_bfloat162& pair) {
  pair = __floats2bfloat162_rn(a, b);
}
template <typename Pair, typename T, int Count>
MMSOFTPOOL_BODY void unpack_pairs(const Pack<T, Count>& pack, float* numbers) {
  MMSOFTPOOL_UNROLL
  for (int i = 0; i + 1 < Count; i += 2) {
    const float2 two = to_float2(Pair(pack.values[i], pack.values[i + 1]));
    numbers[i] = two.x;
    numbers[i + 1] = two.y;
  }
  if (Count % 2 != 0) {
    numbers[Count - 1] = float(pack.values[Count - 1]);
  }
}
template <typename Pair, typename T, int Count>
MMSOFTPOOL_BODY void pack_pairs(const float* numbers, Pack<T, Count>& pack) {
  MMSOFTPOOL_UNROLL
  for (int i = 0; i + 1 < Count; i += 2) {
    Pair two;
    from_float2(numbers[i], numbers[i + 1], two);
    pack.values[i] = two.x;
    pack.values[i + 1] = two.y;
  }
  if (Count % 2 != 0) {
    pack.values[Count - 1] = T(numbers[Count - 1]);
  }
}
template <int Count>
MMSOFTPOOL_BODY void unpack(const Pack<__half, Count>& pack, float* numbers) {
  unpack_pairs<__half2>(pack, numbers);
}
template <int Count>
MMSOFTPOOL_BODY void unpack(const Pack<__nv_bfloat16, Count>& pack, float* numbers) {
  unpack_pairs<__nv_bfloat162>(pack, numbers);
}
template <int Count>
MMSOFTPOOL_BODY void pack_numbers(const float* numbers, Pack<__half, Count>& pack) {
  pack_pairs<__half2>(numbers, pack);
}
template <int Count>
MMSOFTPOOL_BODY void pack_numbers(const float* numbers, Pack<__nv_bfloat16, Count>& pack) {
  pack_pairs<__nv_bfloat162>(numbers, pack);
}
#endif

// Reads `Count` neighbours if they are inside.
template <int Count, typename T, typename Number>
MMSOFTPOOL_BODY void read_if(bool inside, const T* from, Number outside, Number* numbers) {
  MMSOFTPOOL_UNROLL
  for (int i = 0; i < Count; ++i) {
    numbers[i] = outside;
  }
  if (inside) {
    const Pack<T, Count> pack = *reinterpret_cast<const Pack<T, Count>*>(from);
    unpack(pack, numbers);
  }
}

}  // namespace mmsoftpool::cuda
