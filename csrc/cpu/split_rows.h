// Contiguous tensors: rows of the input are copied once into a small cache, converted to the type
// computed with, framed by -inf for what is absent, and split by column modulo the stride: tap k of
// all windows of the row is then contiguous.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "rows.h"
#include "simd.h"

namespace mmsoftpool::cpu {

// A row of the input, split by column modulo the stride. Column c is at place p = c + padding;
// places p, p + stride, p + 2 stride ... are neighbours and form a part. Parts that no tap touches
// are left out, so that a large stride takes no memory. `slack` elements at the end of each part
// may be read and written beyond the last window.
//
// Windows of adaptive pooling are not that regular: each tap has a part of its own, with a place
// for every window, and a column may be in several parts.
struct SplitRow {
  SplitRow(const Axis& width, int64_t slack)
      : width(width),
        part(
            std::max(
                (width.out - 1) * width.stride + width.span() - 1, width.in - 1 + width.padding) /
                width.stride +
            1 + slack) {
    if (width.adaptive) {
      part = width.out + slack;
      sums = part * width.kernel_size;
      size = sums + width.in + slack;
      firsts.resize(width.out);
      // Axis::first_input() and taps(), without a division for each window.
      const int64_t quotient = width.in / width.out, remainder = width.in % width.out;
      for (int64_t o = 0, first = 0, rest = 0; o < width.out; ++o) {
        firsts[o] = first;
        int64_t taps = quotient;
        rest += remainder;
        if (rest >= width.out) {
          rest -= width.out;
          ++taps;
        }
        first += taps;
        for (int64_t k = taps + (rest > 0 ? 1 : 0); k < width.kernel_size; ++k) {
          absent.push_back(k * part + o);
        }
      }
      return;
    }
    for (int64_t k = 0; k < std::min(width.kernel_size, width.stride); ++k) {
      phases.push_back(k * width.dilation % width.stride);
    }
    std::sort(phases.begin(), phases.end());
    phases.erase(std::unique(phases.begin(), phases.end()), phases.end());
    size = part * phases.size();
    for (size_t i = 0; i < phases.size(); ++i) {
      int64_t column = (phases[i] - width.padding) % width.stride;
      column += column < 0 ? width.stride : 0;
      if (column < width.in) {
        const int64_t place = i * part + (column + width.padding) / width.stride;
        runs.push_back({column, place, (width.in - 1 - column) / width.stride + 1});
      }
    }
    if (has_pairs()) {
      for (int column : {0, 1}) {
        pairs[column] = (column + width.padding) % 2 * part + (column + width.padding) / 2;
      }
    }
  }

  // Whether some columns are in no part.
  bool has_gaps() const { return static_cast<int64_t>(phases.size()) < width.stride; }

  // Whether the stride is 2 and columns of both parities are in a part.
  bool has_pairs() const { return width.stride == 2 && !has_gaps(); }

  // Where tap k of the first window is; that of the next window follows it.
  int64_t offset(int64_t k) const {
    if (width.adaptive) {
      return k * part;
    }
    const int64_t place = k * width.dilation;
    const auto phase = std::lower_bound(phases.begin(), phases.end(), place % width.stride);
    return (phase - phases.begin()) * part + place / width.stride;
  }

  // Columns `stride` apart are neighbours in a part: `number` of them, from `column` at `place` on.
  struct Run {
    int64_t column, place, number;
  };

  Axis width;
  int64_t part, size;
  std::vector<int64_t> phases;  // places modulo the stride, ascending
  std::vector<Run> runs;
  int64_t pairs[2] = {};  // of has_pairs(): where the columns 0 and 1 are
  // Of adaptive pooling: the first column of each window, the places without a tap, and where
  // merge_row() adds up the parts.
  std::vector<int64_t> firsts, absent;
  int64_t sums = 0;
};

// The columns of even and of odd number apart; a vector of both at a time.
template <typename S, typename T>
MMSOFTPOOL_INLINE void split_pairs(
    const T* row, int64_t size, Compute<T>* __restrict even, Compute<T>* __restrict odd) {
  if constexpr (std::is_same_v<T, Compute<T>>) {  // the compiler vectorises it
    for (int64_t i = 0; i < size / 2; ++i) {
      even[i] = row[2 * i];
      odd[i] = row[2 * i + 1];
    }
    if (size % 2 == 1) {
      even[size / 2] = row[size - 1];
    }
  } else {
    typename S::Vec a, b;
    int64_t i = 0;
    for (; 2 * (i + S::lanes) <= size; i += S::lanes) {
      S::load_pairs(row + 2 * i, a, b);
      S::store(a, even + i);
      S::store(b, odd + i);
    }
    T rest[2 * S::lanes] = {};
    std::copy_n(row + 2 * i, size - 2 * i, rest);
    S::load_pairs(rest, a, b);
    S::store_first(a, even + i, (size + 1) / 2 - i);
    S::store_first(b, odd + i, size / 2 - i);
  }
}

template <typename S, typename T>
MMSOFTPOOL_INLINE void merge_pairs(
    const Compute<T>* even, const Compute<T>* odd, int64_t size, T* __restrict row) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    for (int64_t i = 0; i < size / 2; ++i) {
      row[2 * i] = even[i];
      row[2 * i + 1] = odd[i];
    }
    if (size % 2 == 1) {
      row[size - 1] = even[size / 2];
    }
  } else {
    int64_t i = 0;
    for (; 2 * (i + S::lanes) <= size; i += S::lanes) {
      S::store_pairs(S::load(even + i), S::load(odd + i), row + 2 * i);
    }
    T rest[2 * S::lanes];
    S::store_pairs(
        S::load_first(even + i, (size + 1) / 2 - i), S::load_first(odd + i, size / 2 - i), rest);
    std::copy_n(rest, size - 2 * i, row + 2 * i);
  }
}

template <typename S, typename T>
MMSOFTPOOL_INLINE void split_row(const SplitRow& layout, const T* row, Compute<T>* split) {
  if (layout.width.adaptive) {
    const int64_t out = layout.width.out, last = layout.width.in - 1;
    for (int64_t k = 0; k < layout.width.kernel_size; ++k) {
      T buffer[S::lanes] = {};
      for (int64_t o = 0; o < out; o += S::lanes) {
        const int64_t n = std::min(S::lanes, out - o);
        for (int64_t i = 0; i < n; ++i) {
          buffer[i] = row[std::min(layout.firsts[o + i] + k, last)];
        }
        S::store(S::load(buffer), split + k * layout.part + o);  // there is slack behind
      }
    }
    for (const int64_t place : layout.absent) {
      split[place] = -std::numeric_limits<Compute<T>>::infinity();
    }
    return;
  }
  const int64_t stride = layout.width.stride;
  if (layout.has_pairs()) {
    return split_pairs<S>(row, layout.width.in, split + layout.pairs[0], split + layout.pairs[1]);
  }
  for (const auto& [column, place, number] : layout.runs) {
    Compute<T>* const to = split + place;
    const T* const from = row + column;
    if constexpr (std::is_same_v<T, Compute<T>>) {
      if (stride == 1) {
        std::copy_n(from, number, to);
        continue;
      }
    }
    T buffer[S::lanes];
    for (int64_t i = 0; i < number; i += S::lanes) {
      const int64_t n = std::min(S::lanes, number - i);
      if (stride == 1 && n == S::lanes) {
        S::store(S::load(from + i), to + i);
        continue;
      }
      for (int64_t j = 0; j < n; ++j) {
        buffer[j] = from[stride * (i + j)];
      }
      S::store_first(S::load_first(buffer, n), to + i, n);
    }
  }
}

// Writes a row of gradients and sets its sums back to 0.
template <typename S, typename T>
MMSOFTPOOL_INLINE void merge_row(const SplitRow& layout, Compute<T>* split, T* row) {
  using A = Compute<T>;
  const int64_t stride = layout.width.stride;
  if (layout.width.adaptive) {
    const int64_t in = layout.width.in;
    A* const sums = split + layout.sums;
    for (const int64_t place : layout.absent) {
      split[place] = 0;
    }
    for (int64_t k = 0; k < layout.width.kernel_size; ++k) {
      for (int64_t o = 0; o < layout.width.out; ++o) {
        sums[layout.firsts[o] + k] += split[k * layout.part + o];
      }
    }
    for (int64_t i = 0; i < in; i += S::lanes) {
      S::store_first(S::load(sums + i), row + i, std::min(S::lanes, in - i));
    }
    std::fill_n(split, layout.size, A(0));
    return;
  }
  if (layout.has_gaps()) {
    std::fill_n(row, layout.width.in, T{});
  }
  if (layout.has_pairs()) {
    merge_pairs<S>(split + layout.pairs[0], split + layout.pairs[1], layout.width.in, row);
  } else {
    for (const auto& [column, place, number] : layout.runs) {
      const A* const from = split + place;
      T* const to = row + column;
      T buffer[S::lanes];
      for (int64_t i = 0; i < number; i += S::lanes) {
        const int64_t n = std::min(S::lanes, number - i);
        if (stride == 1 && n == S::lanes) {
          S::store(S::load(from + i), to + i);
          continue;
        }
        S::store_first(S::load_first(from + i, n), buffer, n);
        for (int64_t j = 0; j < n; ++j) {
          to[stride * (i + j)] = buffer[j];
        }
      }
    }
  }
  std::fill_n(split, layout.size, A(0));
}

// The split rows of the input, and where the taps of a row of windows are in them.
template <typename S, typename T>
class SplitInput {
 public:
  using A = Compute<T>;

  SplitInput(const Pooling& pooling, const SplitRow& layout)
      : pooling_(pooling),
        layout_(layout),
        rows_(pooling, layout.size, -std::numeric_limits<A>::infinity(), false),
        offsets_(pooling.width.kernel_size) {
    for (int64_t k = 0; k < pooling.width.kernel_size; ++k) {
      offsets_[k] = layout.offset(k);
    }
    taps_.reserve(pooling.taps());
  }

  // The taps of the first window of output row (od, oh); those of the next window follow them.
  MMSOFTPOOL_INLINE const Pointers<const A>& taps(
      const T* input, int64_t plane, int64_t od, int64_t oh) {
    taps_.clear();
    for_each_row(pooling_, od, oh, [&](int64_t d, int64_t h) INLINED {
      const A* const row = rows_.get(plane, d, h, [&](A* split) INLINED {
        const int64_t number = (plane * pooling_.depth.in + d) * pooling_.height.in + h;
        split_row<S>(layout_, input + number * pooling_.width.in, split);
      });
      for (const int64_t offset : offsets_) {
        taps_.push_back(row + offset);
      }
    });
    return taps_;
  }

  const std::vector<int64_t>& offsets() const { return offsets_; }

 private:
  const Pooling& pooling_;
  const SplitRow& layout_;
  RowCache<A> rows_;
  std::vector<int64_t> offsets_;
  Pointers<const A> taps_;
};

}  // namespace mmsoftpool::cpu
