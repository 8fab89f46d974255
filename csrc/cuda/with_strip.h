// Which strips a pooling has, if any.
#pragma once

#include "strip.h"

namespace mmsoftpool::cuda {

// Whether the rows of a contiguous tensor are whole packs of `columns` numbers, `stride` of which
// make an output. (A smaller out is that of a 3 x 3 window without padding.)
inline bool is_packed(const Pooling& pooling, bool aligned, int64_t columns) {
  const Axis& axis = pooling.width;
  const int64_t whole = axis.in / axis.stride;
  const bool shorter = axis.kernel_size > axis.stride && axis.padding == 0;
  return aligned && axis.in % columns == 0 && (shorter ? axis.out <= whole : axis.out == whole);
}

// Calls run(strip) with the strip that fits the pooling and returns true, or returns false.
// `aligned` says that all tensors begin at a multiple of 16 bytes.
template <typename T, bool Backward, typename Run>
bool with_strip(const Pooling& pooling, bool aligned, const Run& run) {
  const auto is = [&](int64_t kernel_size, int64_t stride, int64_t padding) {
    for (const Axis* axis : {&pooling.height, &pooling.width}) {
      if (axis->kernel_size != kernel_size || axis->stride != stride || axis->padding != padding ||
          axis->dilation != 1) {
        return false;
      }
    }
    return true;
  };
  const auto run_if_it_fits = [&](auto strip) {
    if (!decltype(strip)::fits(pooling)) {
      return false;
    }
    run(strip);
    return true;
  };
  if constexpr (sizeof(T) == 8) {
    return false;
  } else {
    constexpr int64_t limit = 1 << 29;  // columns and rows are counted in 32 bits
    const bool is_plane =
        pooling.depth.in == 1 && pooling.depth.out == 1 && pooling.depth.kernel_size == 1;
    // An alpha near 0 has a unit of its own, see Exponent.
    if (!is_plane || pooling.is_adaptive() || pooling.height.in >= limit ||
        pooling.width.in >= limit || pooling.channels >= limit ||
        make_exponent<float>(pooling).unit != 1) {
      return false;
    }
    const auto run_in_layout = [&](auto kernel_size, auto stride, auto padding) {
      constexpr int K = decltype(kernel_size)::value, S = decltype(stride)::value;
      constexpr int Pad = decltype(padding)::value;
      if (pooling.layout == Layout::channels_last) {
        // The backward's strips, whose edges are computed twice, are wider.
        using Last = Strip<T, K, S, Pad, Backward ? 2 : 1, Backward ? 2 : 4, false>;
        return aligned && pooling.channels % 4 == 0 && run_if_it_fits(Last());
      }
      // 16 bytes of columns, or 8.
      constexpr int cols = sizeof(T) == 4 ? 4 / S : 4;
      return is_packed(pooling, aligned, S * cols)
                 ? run_if_it_fits(Strip<T, K, S, Pad, cols, 1, true>())
                 : run_if_it_fits(Strip<T, K, S, Pad, cols, 1, false>());
    };
    using one = std::integral_constant<int, 1>;
    using two = std::integral_constant<int, 2>;
    using three = std::integral_constant<int, 3>;
    using zero = std::integral_constant<int, 0>;
    if (is(2, 2, 0)) {
      return run_in_layout(two(), two(), zero());
    }
    if (is(3, 2, 0)) {
      return run_in_layout(three(), two(), zero());
    }
    if (is(3, 2, 1)) {
      return run_in_layout(three(), two(), one());
    }
    return false;
  }
}

// How many windows a thread of the strip S walks down: as many as leave enough threads to fill any
// GPU several times over. threads_per_row: how many threads there are for a row of windows.
template <typename S>
int64_t strip_rows(int64_t threads_per_row, int64_t height) {
  constexpr int64_t wanted = 1 << 19;
  int64_t rows = S::max_rows;
  while (rows > 1 && threads_per_row * ((height + rows - 1) / rows) < wanted) {
    rows /= 2;
  }
  return rows;
}

}  // namespace mmsoftpool::cuda
