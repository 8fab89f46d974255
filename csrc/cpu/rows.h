// What both layouts do with rows: which rows a row of windows reaches, a cache of rows, and the
// order in which the backward completes them.
#pragma once

#include <algorithm>
#include <vector>

#include "../pooling.h"
#include "simd.h"

namespace mmsoftpool::cpu {

template <typename T>
using Pointers = std::vector<T*>;

// Whether the windows are disjoint and cover the map, as those of 2 x 2 at stride 2 do.
inline bool tile_the_map(const Pooling& pooling) {
  const auto tile = [](const Axis& axis) {
    return axis.out * axis.kernel_size == axis.in && axis.padding == 0 && axis.dilation == 1 &&
           !axis.adaptive && (axis.out == 1 || axis.stride == axis.kernel_size);
  };
  return tile(pooling.depth) && tile(pooling.height) && tile(pooling.width);
}

// Calls visit(d, h) for the rows of the input that the windows of output row (od, oh) reach.
template <typename Visit>
MMSOFTPOOL_INLINE void for_each_row(const Pooling& pooling, int64_t od, int64_t oh, Visit&& visit) {
  const Axis &depth = pooling.depth, &height = pooling.height;
  // Of adaptive pooling these are divisions.
  const int64_t first_d = depth.first_input(od), taps_d = depth.taps(od);
  const int64_t first_h = height.first_input(oh), taps_h = height.taps(oh);
  for (int64_t kd = 0; kd < taps_d; ++kd) {
    const int64_t d = first_d + kd * depth.dilation;
    for (int64_t kh = 0; kh < taps_h; ++kh) {
      const int64_t h = first_h + kh * height.dilation;
      if (d >= 0 && d < depth.in && h >= 0 && h < height.in) {
        visit(d, h);
      }
    }
  }
}

// Calls visit(row, plane, od, oh) for the rows of outputs [begin, end), without divisions for each.
template <typename Visit>
MMSOFTPOOL_INLINE void for_each_output_row(
    const Pooling& pooling, int64_t begin, int64_t end, Visit&& visit) {
  const int64_t depth = pooling.depth.out, height = pooling.height.out;
  int64_t plane = begin / height / depth, od = begin / height % depth, oh = begin % height;
  for (int64_t row = begin; row < end; ++row) {
    visit(row, plane, od, oh);
    if (++oh == height) {
      oh = 0;
      od = od + 1 == depth ? 0 : od + 1;
      plane += od == 0 ? 1 : 0;
    }
  }
}

// Calls visit(w) for the columns of the input that window ow reaches.
template <typename Visit>
MMSOFTPOOL_INLINE void for_each_column(const Axis& width, int64_t ow, Visit&& visit) {
  const int64_t first = width.first_input(ow), taps = width.taps(ow);
  for (int64_t k = 0; k < taps; ++k) {
    const int64_t w = first + k * width.dilation;
    if (w >= 0 && w < width.in) {
      visit(w);
    }
  }
}

// Slots for rows (d, h) of the planes that are worked on in turn. Rows that one window reaches
// never share a slot; with whole_slices, no rows of the slices (d) that it reaches do.
template <typename A>
class RowCache {
 public:
  RowCache(const Pooling& pooling, int64_t row_size, A fill, bool whole_slices)
      : height_(pooling.height.in),
        rows_per_plane_(pooling.depth.in * height_),
        slots_d_(std::min(pooling.depth.span(), pooling.depth.in)),
        slots_h_(whole_slices ? height_ : std::min(pooling.height.span(), height_)),
        row_size_(row_size),
        owners_(slots_d_ * slots_h_, -1),
        values_(slots_d_ * slots_h_ * row_size_, fill) {}

  // The values of a row; where its slot contained another's, claim(values) is called before.
  template <typename Claim>
  MMSOFTPOOL_INLINE A* get(int64_t plane, int64_t d, int64_t h, Claim&& claim) {
    const int64_t slot = this->slot(d, h), number = this->number(plane, d, h);
    A* const row = values_.data() + slot * row_size_;
    if (owners_[slot] != number) {
      owners_[slot] = number;
      claim(row);
    }
    return row;
  }
  // The same, or null where the slot contains another row.
  A* find(int64_t plane, int64_t d, int64_t h) {
    const int64_t slot = this->slot(d, h);
    return owners_[slot] == number(plane, d, h) ? values_.data() + slot * row_size_ : nullptr;
  }

 private:
  int64_t slot(int64_t d, int64_t h) const {
    return (d < slots_d_ ? d : d % slots_d_) * slots_h_ + (h < slots_h_ ? h : h % slots_h_);
  }
  int64_t number(int64_t plane, int64_t d, int64_t h) const {
    return plane * rows_per_plane_ + d * height_ + h;
  }

  int64_t height_, rows_per_plane_, slots_d_, slots_h_, row_size_;
  std::vector<int64_t> owners_;
  std::vector<A> values_;
};

// The rows of grad_input, in the type computed with, while windows still add to them. No atomics:
// always the same order of additions.
template <typename A>
class GradientRows {
 public:
  GradientRows(const Pooling& pooling, int64_t row_size)
      : pooling_(pooling), rows_(pooling, row_size, A(0), keeps_slices(pooling)) {}

  // Windows that overlap in depth come back to a row after the whole slice in between.
  static bool keeps_slices(const Pooling& pooling) { return pooling.depth.kernel_size > 1; }

  // The sums of a row, which an output row is about to add to.
  MMSOFTPOOL_INLINE A* claim(int64_t plane, int64_t d, int64_t h) {
    return rows_.get(plane, d, h, [](A*) INLINED {});
  }

  // Calls add(od, oh) for every row of outputs of a plane, and write(d, h, sums) for every row of
  // inputs as soon as it is complete; sums is null for a row that no window reaches, and write sets
  // it back to 0.
  template <typename Add, typename Write>
  MMSOFTPOOL_INLINE void for_each_output_row(int64_t plane, Add&& add, Write&& write) {
    const Axis &depth = pooling_.depth, &height = pooling_.height;
    int64_t written = 0;
    const auto write_until = [&](int64_t end) INLINED {
      for (; written < end; ++written) {
        const int64_t d = depth.in == 1 ? 0 : written / height.in, h = written - d * height.in;
        write(d, h, rows_.find(plane, d, h));
      }
    };
    for (int64_t od = 0; od < depth.out; ++od) {
      for (int64_t oh = 0; oh < height.out; ++oh) {
        const int64_t d = std::clamp<int64_t>(depth.first_input(od), 0, depth.in);
        const int64_t h = std::clamp<int64_t>(height.first_input(oh), 0, height.in);
        write_until(d * height.in + (keeps_slices(pooling_) || d == depth.in ? 0 : h));
        add(od, oh);
      }
    }
    write_until(depth.in * height.in);
  }

 private:
  const Pooling& pooling_;
  RowCache<A> rows_;
};

}  // namespace mmsoftpool::cpu
