// Contiguous rows, copied once into a small cache, converted to the type computed with, framed by
// -inf for what is absent, and split by column modulo the stride: tap k of all windows of the row
// is then contiguous.
#pragma once

#include <algorithm>
#include <vector>

#include "../pooling.h"
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
  // by_columns: whether they are copied one by one where vectors could be, too.
  SplitRow(const Axis& width, int64_t slack, bool by_columns = false) : width(width) {
    if (width.adaptive) {
      part = width.out + slack;
      size = part * width.kernel_size;
      for (int64_t o = 0; o < width.out; ++o) {
        for (int64_t k = 0; k < width.taps(o); ++k) {
          columns.push_back({k * part + o, width.first_input(o) + k});
        }
      }
      return;
    }
    for (int64_t k = 0; k < std::min(width.kernel_size, width.stride); ++k) {
      phases.push_back(k * width.dilation % width.stride);
    }
    std::sort(phases.begin(), phases.end());
    phases.erase(std::unique(phases.begin(), phases.end()), phases.end());
    const int64_t last = (width.out - 1) * width.stride + width.span() - 1;
    part = std::max(last, width.in - 1 + width.padding) / width.stride + 1 + slack;
    size = part * phases.size();
    for (int64_t column : {0, 1}) {
      const int64_t place = column + width.padding;
      places[column] = place % width.stride * part + place / width.stride;
    }
    if ((is_whole() || has_pairs()) && !by_columns) {
      return;
    }
    for (int64_t i = 0; i < static_cast<int64_t>(phases.size()); ++i) {
      int64_t column = (phases[i] - width.padding) % width.stride;
      column += column < 0 ? width.stride : 0;
      for (; column < width.in; column += width.stride) {
        columns.push_back({i * part + (column + width.padding) / width.stride, column});
      }
    }
  }

  // Whether all columns are in one part, or in two by their parity. Then vectors are copied.
  bool is_whole() const { return width.stride == 1 && !width.adaptive; }
  bool has_pairs() const { return width.stride == 2 && phases.size() == 2; }
  // Whether some columns are in no part.
  bool has_gaps() const { return static_cast<int64_t>(phases.size()) < width.stride; }

  // With room behind the parts for a row in the type computed with.
  int64_t size_with_row() const { return size + (is_whole() || has_pairs() ? 0 : width.in); }

  // Where tap k of the first window is; that of the next window follows it.
  int64_t offset(int64_t k) const {
    if (width.adaptive) {
      return k * part;
    }
    const int64_t place = k * width.dilation;
    const auto phase = std::lower_bound(phases.begin(), phases.end(), place % width.stride);
    return (phase - phases.begin()) * part + place / width.stride;
  }
  struct Column {
    int64_t place, column;
  };

  Axis width;
  int64_t part, size;
  std::vector<int64_t> phases;  // places modulo the stride, ascending
  std::vector<Column> columns;  // where they are copied one by one
  int64_t places[2] = {};       // of the columns 0 and 1, where vectors are copied
};

template <typename S, typename From, typename To>
MMSOFTPOOL_INLINE void copy_row(const From* from, int64_t size, To* to) {
  int64_t i = 0;
  for (; i + S::lanes <= size; i += S::lanes) {
    S::store(S::load(from + i), to + i);
  }
  if (i < size) {
    S::store_first(S::load_first(from + i, size - i), to + i, size - i);
  }
}

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
  const int64_t in = layout.width.in;
  if (layout.is_whole()) {
    return copy_row<S>(row, in, split + layout.places[0]);
  }
  if (layout.has_pairs()) {
    return split_pairs<S>(row, in, split + layout.places[0], split + layout.places[1]);
  }
  const Compute<T>* x = split + layout.size;
  if constexpr (std::is_same_v<T, Compute<T>>) {
    x = row;
  } else {
    copy_row<S>(row, in, split + layout.size);
  }
  for (const auto& [place, column] : layout.columns) {
    split[place] = x[column];
  }
}

// Writes a row of gradients: the sums of what the places of its columns hold.
template <typename S, typename T>
MMSOFTPOOL_INLINE void merge_row(const SplitRow& layout, Compute<T>* split, T* row) {
  const int64_t in = layout.width.in;
  if (layout.is_whole()) {
    copy_row<S>(split + layout.places[0], in, row);
  } else if (layout.has_pairs()) {
    merge_pairs<S>(split + layout.places[0], split + layout.places[1], in, row);
  } else {
    Compute<T>* sums = split + layout.size;
    if constexpr (std::is_same_v<T, Compute<T>>) {
      sums = row;
    }
    std::fill_n(sums, in, Compute<T>(0));
    for (const auto& [place, column] : layout.columns) {
      sums[column] += split[place];
    }
    if constexpr (!std::is_same_v<T, Compute<T>>) {
      copy_row<S>(sums, in, row);
    }
  }
}

}  // namespace mmsoftpool::cpu
