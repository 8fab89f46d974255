// What strips and rings share: threads that walk down the rows of a plane, and packs, several
// neighbouring numbers that are moved and converted at once.
#pragma once

#include <algorithm>

#include "window.h"

namespace mmsoftpool::cuda {

// `Count` neighbouring numbers that one instruction moves: they are aligned to their whole size.
template <typename T, int Count>
struct alignas(sizeof(T) * Count) Pack {
  T values[Count];
};

// Keeps the compiler from knowing x. A pointer that such a number is added to takes one
// instruction, a multiplication to 64 bits; a number that it knows is made one of 64 bits, which
// take two.
MMSOFTPOOL_BODY int32_t opaque(int32_t x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Between the type of the tensors and float, or of the same type. The 16-bit types go in pairs: the
// GPU takes a number out of a register with two, or packs two, in one instruction.
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

template <int Count, typename T, typename Number>
MMSOFTPOOL_BODY void write(const Number* numbers, T* to) {
  Pack<T, Count> pack;
  pack_numbers<Count>(numbers, pack);
  *reinterpret_cast<Pack<T, Count>*>(to) = pack;
}

// Reads a row: `Before` columns, `Columns` of which the first is at `from`, and `After`, of
// `Channels` numbers each; `outside` where there are none. has(j) says whether column j, from the
// first one on, is there. Packed: the `Columns` are whole, aligned packs of `Whole` numbers, which
// are there or not; so is what lies on either side.
template <
    int Before, int Columns, int After, int Channels, int Whole, typename T, typename Number,
    typename Has>
MMSOFTPOOL_BODY void read_row(
    const T* from, int32_t step, Number outside, const Has& has,
    Number (&row)[(Before + Columns + After) * Channels]) {
  if constexpr (Whole > 1) {
    static_assert(Channels == 1);
    const auto read = [&](auto count, int first) {
      constexpr int Count = decltype(count)::value;
      Number numbers[Count];
      read_if<Count>(first == 0 || has(first), from + first, outside, numbers);
      MMSOFTPOOL_UNROLL
      for (int j = 0; j < Count; ++j) {
        if (first + j >= -Before && first + j < Columns + After) {
          row[Before + first + j] = numbers[j];
        }
      }
    };
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < Columns; j += Whole) {
      read(std::integral_constant<int, Whole>(), j);
    }
    // On either side packs, of the last of which not all numbers may be needed.
    constexpr int before = Before == 0 || Before > 2 ? Whole : Before;
    constexpr int after = After == 0 || After > 2 ? Whole : After;
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < Before; j += before) {
      read(std::integral_constant<int, before>(), -j - before);
    }
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < After; j += after) {
      read(std::integral_constant<int, after>(), Columns + j);
    }
  } else {
    from -= int64_t(step) * Before;
    MMSOFTPOOL_UNROLL
    for (int j = 0; j < Before + Columns + After; ++j) {
      read_if<Channels>(has(j - Before), from, outside, row + j * Channels);
      from += opaque(step);
    }
  }
}
// Writes the columns of a row that are there.
template <int Channels, int Whole, typename T, typename Number, int Numbers, typename Has>
MMSOFTPOOL_BODY void write_row(const Number (&row)[Numbers], T* to, int32_t step, const Has& has) {
  constexpr int count = Whole > 1 ? Whole : Channels;
  MMSOFTPOOL_UNROLL
  for (int j = 0; j < Numbers / count; ++j) {
    if ((Whole > 1 && j == 0) || has(j * count / Channels)) {
      write<count>(row + j * count, to);
    }
    to += Whole > 1 ? Whole : opaque(step);
  }
}

// Which strip of columns thread i walks down, of which channel and plane, and from which row on.
struct WalkPlace {
  int32_t row, strip;
  int64_t input, output;  // where the plane begins, or with the channels last the channel
};

struct WalkArguments {
  float log2e_alpha, per_log2e_alpha;
  float slope;  // d log(2^t) / dt for the exact gradient, 0 for the paper's
  int32_t in_h, in_w, out_h, out_w;
  int32_t step;                   // from a column to the next
  int32_t rows;                   // that a thread walks down
  uint32_t packs, strips, parts;  // of an image or plane: packs of channels, strips, their parts
  int64_t in_size, out_size;      // from an image or plane to the next
  int64_t threads;

  // A thread has so many channels, a strip of some columns and `rows` of height rows.
  WalkArguments(
      const Pooling& pooling, int64_t channels, int64_t strips, int64_t height, int64_t rows)
      : log2e_alpha(make_exponent<float>(pooling).log2e_alpha_per_unit),
        per_log2e_alpha(1 / log2e_alpha),
        slope(pooling.gradient == Gradient::exact ? 0.6931472f : 0.0f),
        in_h(static_cast<int32_t>(pooling.height.in)),
        in_w(static_cast<int32_t>(pooling.width.in)),
        out_h(static_cast<int32_t>(pooling.height.out)),
        out_w(static_cast<int32_t>(pooling.width.out)),
        step(pooling.layout == Layout::channels_last ? static_cast<int32_t>(pooling.channels) : 1),
        rows(static_cast<int32_t>(rows)),
        packs(static_cast<uint32_t>(step / channels)),
        strips(static_cast<uint32_t>(strips)),
        parts(static_cast<uint32_t>((height + rows - 1) / rows)),
        in_size(pooling.in_plane() * step),
        out_size(pooling.out_plane() * step),
        threads(pooling.planes() / channels * strips * parts) {}

  MMSOFTPOOL_BODY WalkPlace find_place(uint32_t i, int channels) const {
    const uint32_t c = i % packs * static_cast<uint32_t>(channels);
    i /= packs;
    const uint32_t strip = i % strips;
    i /= strips;
    const uint32_t part = i % parts;
    i /= parts;  // an image, or a plane if the tensor is contiguous
    return {
        static_cast<int32_t>(part) * rows, static_cast<int32_t>(strip), i * in_size + c,
        i * out_size + c};
  }
};

// How many of `height` rows a thread walks down, at least `least` and at most `most`: so many that
// there are `wanted` threads, enough to fill any GPU. `strips`: how many there are in all.
inline int64_t choose_rows(
    int64_t strips, int64_t height, int64_t least, int64_t most, int64_t wanted) {
  int64_t parts = (height + most - 1) / most;
  while (strips * parts < wanted && height / (2 * parts) >= least) {
    parts *= 2;
  }
  return std::max<int64_t>(1, (height + parts - 1) / parts);
}

// Calls run(kernel) for thread i; ring.h has kernels that go another way for some threads.
template <typename Kernel, typename Run>
MMSOFTPOOL_BODY void with_way(
    Kernel kernel, const typename Kernel::Arguments&, typename Kernel::Int, const Run& run) {
  run(kernel);
}

}  // namespace mmsoftpool::cuda
